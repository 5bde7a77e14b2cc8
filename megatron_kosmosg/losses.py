"""The losses of `pretrain` and `align` (paper sections 2.1, 2.2); score/loss.py has `instruct`'s.

Every loss is a float32 sum over its items: the caller also reports how many items it covers, and
Megatron-Core divides by the global count, so that no layout changes the loss.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel


def token_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor
) -> torch.Tensor:
    """Next-token cross-entropy summed over the positions that count.

    Args:
        logits: [s, b, v/tp], this rank's vocabulary shard.
        labels: [b, s].
        loss_mask: [b, s], 1 counts.
    """
    losses = tensor_parallel.vocab_parallel_cross_entropy(
        logits.float(), labels.transpose(0, 1).contiguous()
    )
    return (losses.transpose(0, 1) * loss_mask).sum()


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
    own = (~padding_mask).sum(dim=1)
    errors = error.mean(dim=2).masked_fill(padding_mask, 0).sum(dim=1) / own
    return (num_queries / own * errors).sum()
