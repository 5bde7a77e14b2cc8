"""Low-rank adapters on Megatron-Core's parallel linear layers (LoRA, arXiv 2106.09685).

An adapted layer has two more parameters, `lora_a` [r, inputs] and `lora_b` [outputs, r], and adds
scale * x A^T B^T to what it gives. B is split by rows over tensor-parallel ranks where the layer is
column-parallel, A by columns where it is row-parallel, as the layer's weight is. The other half is
replicated, and under sequence parallelism sees part of the positions, so that Megatron sums its
gradients over the group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_pg_size

from megatron_kosmosg.config.schema import LoraConfig
from megatron_kosmosg.models.norms import mark_sequence_parallel

if TYPE_CHECKING:
    from megatron.core.tensor_parallel.layers import RowParallelLinear as _Linear
else:
    _Linear = object

LORA_A, LORA_B = "lora_a", "lora_b"
ADAPTERS = (f".{LORA_A}", f".{LORA_B}")
"""Ends of the names of adapters' parameters."""


def adapted_column(kind: type, lora: LoraConfig) -> type:
    """A column-parallel linear of class `kind` with an adapter."""
    return _adapted(_Column, kind, lora)


def adapted_row(kind: type, lora: LoraConfig) -> type:
    """A row-parallel linear of class `kind` with an adapter on its (split) input."""
    return _adapted(_Row, kind, lora)


def _adapted(adapter: type, kind: type, lora: LoraConfig) -> type:
    settings = {"rank": lora.rank, "scale": lora.alpha / lora.rank}
    return type(f"Lora{kind.__name__}", (adapter, kind), settings)


class _Adapter(_Linear):
    """Mixin over a parallel linear. Both parameters are zero until `initialise` draws A."""

    rank: int
    scale: float
    split_axes: dict[str, int]
    """Of the parameters that tensor parallelism splits."""
    tp_group: Any
    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self._shards = get_pg_size(self.tp_group)
        self._is_sequence_split = config.sequence_parallel and self._shards > 1
        shapes = {LORA_A: [self.rank, input_size], LORA_B: [output_size, self.rank]}
        for name, axis in self.split_axes.items():
            shapes[name][axis] //= self._shards
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
            if name not in self.split_axes:
                mark_sequence_parallel(parameter, self._is_sequence_split)
            self.register_parameter(name, parameter)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """(output, bias) as the linear gives them for x [s, b, inputs], with the adapter's output
        added; s may be split."""
        output, bias = super().forward(x, *args, **kwargs)
        low = self._exchange(F.linear(x, self.lora_a))
        return output + self.scale * F.linear(low, self.lora_b), bias

    def _exchange(self, low: torch.Tensor) -> torch.Tensor:
        """Turns A's output for this rank's share of x into what this rank's share of B takes."""
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None
    ) -> Any:
        """The linear's own entries; its idea that adapters are replicated is replaced."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state | make_sharded_tensors_for_checkpoint(
            {LORA_A: self.lora_a, LORA_B: self.lora_b},
            prefix,
            self.split_axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class _Column(_Adapter):
    split_axes = {LORA_B: 0}

    def _exchange(self, low: torch.Tensor) -> torch.Tensor:
        """Each rank's rows of B give part of the gradient, which is summed over the group."""
        if self._is_sequence_split:
            return tensor_parallel.gather_from_sequence_parallel_region(low, group=self.tp_group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(low, group=self.tp_group)


class _Row(_Adapter):
    split_axes = {LORA_A: 1}

    def _exchange(self, low: torch.Tensor) -> torch.Tensor:
        """Each rank has part of the inputs: what A makes of them is summed over the group."""
        if self._is_sequence_split:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                low, group=self.tp_group
            )
        return tensor_parallel.reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
