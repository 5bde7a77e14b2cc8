"""The losses of `pretrain` and `align` (paper sections 2.1, 2.2); score/loss.py has `instruct`'s.

Every loss is a float32 sum over its items: the caller also reports how many items it covers, and
Megatron-Core divides by the global count, so that no layout changes the loss.
"""

from __future__ import annotations

import torch

ELEMENTS_AT_ONCE = 2**26
"""Of the logits, that have float32 copies at a time: 256 MiB."""


def token_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    tp_group: torch.distributed.ProcessGroup,
) -> torch.Tensor:
    """Next-token cross-entropy summed over the positions that count, computed in float32. The
    logits are spent: the loss or its gradient writes over them.

    Args:
        logits: [s, b, v/tp], this rank's vocabulary shard.
        labels: [b, s].
        loss_mask: [b, s], 1 counts.
        tp_group: the ranks that share the vocabulary.
    """
    own_labels = labels.transpose(0, 1).contiguous()
    losses = position_cross_entropy(logits, own_labels, tp_group, ELEMENTS_AT_ONCE)
    return (losses.transpose(0, 1) * loss_mask).sum()


def position_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    tp_group: torch.distributed.ProcessGroup,
    elements_at_once: int,
) -> torch.Tensor:
    """Cross-entropy of each position, float32 [s, b], of logits [s, b, v/tp] that stay in their
    dtype: some positions at a time are in float32, once for the loss and once for its gradient,
    which takes the logits' place. labels: [s, b].

    Megatron-Core's `vocab_parallel_cross_entropy` copies logits in half precision whole."""
    return _CrossEntropy.apply(logits, labels, tp_group, elements_at_once)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group, elements_at_once):
        rows, width = logits.flatten(0, 1), logits.shape[-1]
        own = labels.flatten() - group.rank() * width
        is_elsewhere = (own < 0) | (own >= width)
        own = own.masked_fill(is_elsewhere, 0)[:, None]
        predicted = rows.gather(1, own)[:, 0].float()
        log_sum = torch.empty_like(predicted)
        ctx.at_once = max(1, elements_at_once // width)
        for start in range(0, len(rows), ctx.at_once):
            part = slice(start, start + ctx.at_once)
            torch.logsumexp(rows[part].float(), dim=1, out=log_sum[part])
        if group.size() > 1:
            highest = log_sum.clone()
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group)
            shares = (log_sum - highest).exp_()
            sums = torch.stack([shares, predicted.masked_fill_(is_elsewhere, 0)])
            torch.distributed.all_reduce(sums, group=group)
            log_sum, predicted = highest + sums[0].log_(), sums[1]
        ctx.save_for_backward(logits, own, is_elsewhere, log_sum)
        return (log_sum - predicted).view_as(labels)

    @staticmethod
    def backward(ctx, grad):
        logits, own, is_elsewhere, log_sum = ctx.saved_tensors
        rows, scale = logits.flatten(0, 1), grad.reshape(-1, 1)
        at_label = is_elsewhere[:, None].float() - 1
        for start in range(0, len(rows), ctx.at_once):
            part = slice(start, start + ctx.at_once)
            shares = rows[part].float().sub_(log_sum[part, None]).exp_()
            shares.scatter_add_(1, own[part], at_label[part])
            torch.mul(shares, scale[part], out=rows[part])
            del shares  # before the next ones come
        return rows.view_as(logits), None, None, None


def alignment_loss(condition: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error per sample between M's output and the text encoder's, summed over samples.

    Args:
        condition, target: [b, c, d].
    """
    return (condition.float() - target.float()).square().mean(dim=(1, 2)).sum()


def reconstruction_loss(
    reconstruction: torch.Tensor,
    hidden: torch.Tensor,
    num_queries: int,
    padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """(c / s) times the mean squared error of N(M(hidden)) per sample, summed over samples.

    Args:
        reconstruction, hidden: [b, s, h], where s includes padding: padded positions count, as in
            the authors' code.
        num_queries: c, positions of the condition.
        padding_mask: bool [b, s], True = padding, which then does not count: s is each sample's own
            number of positions.
    """
    error = (reconstruction.float() - hidden.float()).square()
    if padding_mask is None:
        return num_queries / hidden.shape[1] * error.mean(dim=(1, 2)).sum()
    num_valid = (~padding_mask).sum(dim=1)
    errors = error.mean(dim=2).masked_fill(padding_mask, 0).sum(dim=1) / num_valid
    return (num_queries / num_valid * errors).sum()
