"""LayerNorms: replicated ones, and MAGNETO's sub-norm over features that are split over ranks.

MAGNETO (arXiv 2210.06423) norms what enters the second linear of attention and feed-forward. Under
tensor parallelism that is the split axis, so the statistics span the ranks of the group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_pg_size

from megatron_kosmosg.models.linears import RowParallelLinear

try:
    # The function imports its kernel when it is called: an apex built without CUDA has no more.
    import fused_layer_norm_cuda  # noqa: F401 - whether it is there
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine  # untested: no GPU
except ImportError:
    fused_layer_norm_affine = None

if TYPE_CHECKING:
    _Linear = RowParallelLinear
else:
    _Linear = object


def mark_sequence_parallel(parameter: torch.nn.Parameter, is_split: bool) -> None:
    """Megatron's own mark, for finalize_model_grads: whether each rank sees part of the positions,
    so that gradients are summed over the group."""
    # By name, because type checkers know no such attribute of a parameter.
    setattr(parameter, "sequence_parallel", is_split)  # noqa: B010 - see above


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm of Megatron's constructor signature; parameters replicated over the group.

    Under sequence parallelism each rank sees part of the positions, so the parameters are marked
    for Megatron to sum their gradients over the group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(self.weight, config.sequence_parallel)
        mark_sequence_parallel(self.bias, config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis: [..., h] -> the same shape."""
        if fused_layer_norm_affine is not None and x.is_cuda:
            return fused_layer_norm_affine(
                x, self.weight, self.bias, self.normalized_shape, self.eps
            )
        return super().forward(x)


class ShardedLayerNorm(torch.nn.Module):
    """LayerNorm over a feature axis of `hidden_size` of which each rank holds hidden_size/tp."""

    def __init__(self, config: TransformerConfig, hidden_size: int, tp_group) -> None:
        super().__init__()
        self.eps, self.tp_group = config.layernorm_epsilon, tp_group
        shape = hidden_size // get_pg_size(tp_group)
        self.weight = torch.nn.Parameter(torch.ones(shape, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the features that are split over ranks: [..., hidden_size/tp] -> the same
        shape."""
        if get_pg_size(self.tp_group) == 1:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return _ShardedLayerNorm.apply(x, self.weight, self.bias, self.eps, self.tp_group)

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: tuple, metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """The parameters for a distributed checkpoint; both are split along axis 0."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class _ShardedLayerNorm(torch.autograd.Function):
    """The norm with one collective in forward (mean and squared deviation) and one in backward (two
    sums)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        shards, width = group.size(), x.shape[-1]
        x32 = x.float()
        mean = x32.mean(dim=-1)
        centred = x32 - mean.unsqueeze(-1)
        variance = centred.square().mean(dim=-1)  # torch.var_mean is 15 times slower on a CPU
        local = torch.stack([mean, variance])
        everyone = local.new_empty(shards * 2, *mean.shape)
        torch.distributed.all_gather_into_tensor(everyone, local, group=group)
        # Chan's merge of equally large parts: stable also where |mean| >> deviation.
        means, variances = everyone[::2], everyone[1::2]
        total_mean = means.mean(dim=0)
        variance = variances.mean(dim=0).add_((means - total_mean).square_().mean(dim=0))
        rstd = torch.rsqrt(variance.add_(eps)).unsqueeze(-1)
        normalised = centred.add_((mean - total_mean).unsqueeze(-1)).mul_(rstd)
        ctx.save_for_backward(normalised.to(x.dtype), rstd, weight)
        ctx.group, ctx.num_features = group, shards * width
        return torch.addcmul(bias.float(), normalised, weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        normalised, rstd, weight = ctx.saved_tensors
        grad, normalised = grad.float(), normalised.float()
        weighted = grad * weight.float()
        sums = torch.stack([weighted.sum(dim=-1), torch.linalg.vecdot(weighted, normalised)])
        torch.distributed.all_reduce(sums, group=ctx.group)
        sums = sums.div_(ctx.num_features).unsqueeze(-1)
        grad_x = (weighted - sums[0]).addcmul_(normalised, sums[1], value=-1).mul_(rstd)
        tokens = tuple(range(grad.dim() - 1))
        grad_weight = (grad * normalised).sum(dim=tokens)
        return (
            grad_x.to(ctx.saved_tensors[0].dtype),
            grad_weight.to(weight.dtype),
            grad.sum(dim=tokens).to(weight.dtype),
            None,
            None,
        )


class SubLN(_Linear):
    """Mixin over a row-parallel linear: a LayerNorm on its (split) input."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, tp_group: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, tp_group=tp_group, **kwargs)
        self.sub_norm = ShardedLayerNorm(config, input_size, tp_group)

    def forward(self, x: torch.Tensor) -> Any:
        """Maps the normalised input [s, b, input/tp] -> (output without bias, bias)."""
        return super().forward(self.sub_norm(x))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None
    ) -> Any:
        """The linear's own entries; its idea that the norm is replicated is replaced."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state | self.sub_norm.sharded_state_dict(
            f"{prefix}sub_norm.", sharded_offsets, metadata
        )


class SubLNRowParallelLinear(SubLN, RowParallelLinear):
    """The row-parallel linear with MAGNETO's sub-norm."""
