"""Splits a micro-batch's rows over tensor-parallel ranks, for work that is not tensor-parallel.

Plain slicing would give every rank the gradient of its own rows only, silently: the slice's
backward has to gather all rows' gradients.
"""

from __future__ import annotations

import torch

from megatron_kosmosg.data.balance import row_share
from megatron_kosmosg.parallel.context import ParallelContext


def row_range(num_rows: int, context: ParallelContext) -> slice:
    """The rows of this tensor-parallel rank; sizes differ by at most one and may be zero."""
    return row_share(num_rows, context.tp_rank, context.tp_size)


def take_rows(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """This rank's rows of `x` [n, ...], which is the same on all tensor-parallel ranks.

    Backward gathers the ranks' row gradients, so each rank gets the gradient of all rows.
    """
    return x if context.tp_size == 1 else _TakeRows.apply(x, context)


def sum_over_tensor_ranks(value: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Sum of `value` over the tensor-parallel group; backward passes the gradient on unchanged.

    Each rank's part of the loss thus gets the gradient of the whole loss once.
    """
    return value if context.tp_size == 1 else _SumOverRanks.apply(value, context.tp_group)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
        ctx.context, ctx.num_rows = context, x.shape[0]
        return x[row_range(x.shape[0], context)].clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        context = ctx.context
        # Rows are ragged, collectives are not: every rank sends as many rows as the largest share.
        most = -(-ctx.num_rows // context.tp_size)
        sent = grad.new_zeros(most, *grad.shape[1:])
        sent[: grad.shape[0]] = grad
        gathered = grad.new_empty(context.tp_size * most, *grad.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, sent, group=context.tp_group)
        size, extra = divmod(ctx.num_rows, context.tp_size)
        parts = gathered.split(most)
        rows = [part[: size + (rank < extra)] for rank, part in enumerate(parts)]
        return torch.cat(rows), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        total = value.detach().clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, None
