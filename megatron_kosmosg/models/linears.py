"""Megatron-Core's parallel linears, except that the product itself adds the bias where one rank
holds the whole weight.

Megatron adds biases afterwards, in a pass over the output of its own: its fused kernels take them
there, and a row-parallel product must be summed over the ranks first. Without those kernels and
with nothing to sum, that pass is time and memory for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.utils import get_pg_size

if TYPE_CHECKING:
    _Linear = tensor_parallel.RowParallelLinear
else:
    _Linear = object


class _BiasInProduct(_Linear):
    """Mixin over a parallel linear. Its gradients come from torch, so a run whose kernels add them
    to the buffers in the product (`gradient_accumulation_fusion`) keeps Megatron's function."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Maps x [s, b, inputs] -> (output, None), or what Megatron's linear gives: (output, bias
        that is still to be added)."""
        is_whole = get_pg_size(self.tp_group) == 1 and not args and not kwargs
        if self.bias is None or not is_whole or self.gradient_accumulation_fusion:
            return super().forward(x, *args, **kwargs)
        return F.linear(x, self.weight, self.bias), None


class ColumnParallelLinear(_BiasInProduct, tensor_parallel.ColumnParallelLinear):
    """Megatron's linear whose outputs are split over the ranks."""


class RowParallelLinear(_BiasInProduct, tensor_parallel.RowParallelLinear):
    """Megatron's linear whose inputs are split over the ranks."""
