"""What pipeline stages hand to each other: one 3-D tensor, whatever it carries.

Inside the decoder it is the residual stream [s, b, h], or [s/tp, b, h] under sequence parallelism.
Behind AlignerNet's M it is [s + r, b, h]: rows 0..s-1 hold the decoder's final states, and rows
s..s+r-1 the condition: sample j's c*d numbers in order, zero-filled to r*h, r = ceil(c*d / h).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pack_boundary(hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Joins hidden states [s, b, h] and a condition [b, c, d] into one tensor [s + r, b, h]."""
    width = hidden.shape[-1]
    flat = condition.flatten(1)  # [b, c*d]
    flat = F.pad(flat, (0, -flat.shape[1] % width))
    rows = flat.unflatten(1, (-1, width)).transpose(0, 1)
    return torch.cat([hidden, rows.to(hidden.dtype)])


def unpack_boundary(
    packed: torch.Tensor, num_queries: int, condition_width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states [s, b, h] and the condition [b, c, d] that `pack_boundary` joined."""
    size = num_queries * condition_width
    rows = -(-size // packed.shape[-1])
    hidden, condition = packed[:-rows], packed[-rows:]
    flat = condition.transpose(0, 1).flatten(1)[:, :size]
    return hidden, flat.unflatten(1, (num_queries, condition_width))


class _ZeroGradient(torch.autograd.Function):
    """Returns `value` as if it depended on `source`, to which no gradient flows."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        ctx.like = (source.shape, source.dtype, source.device)
        return value.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        shape, dtype, device = ctx.like
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def with_zero_gradient(value: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """`value`, tied to the tensor received from the pipeline stage before by a gradient of zero.

    Megatron's schedule sends the received tensor's gradient back whether or not anything upstream
    trains; this supplies one without running the backward of frozen layers.
    """
    return _ZeroGradient.apply(value, received)
