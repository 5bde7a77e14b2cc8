"""The loss of logits over all ranks that share the vocabulary, against torch's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_kosmosg.losses import position_cross_entropy, token_cross_entropy
from megatron_kosmosg.parallel import platform
from tests.support.ranks import run_ranks
from tests.support.tiny_models import tiny_config

LENGTH, ROWS, WIDTH, TOKENS = 7, 3, 32, 21
"""Of 32 columns the last 11 are padding of the vocabulary: all of some rank's, of four."""

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, labels, loss mask)."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(LENGTH, ROWS, WIDTH, generator=generator)
    logits[..., TOKENS:] = float("-inf")
    labels = torch.randint(TOKENS, (ROWS, LENGTH), generator=generator)
    mask = (torch.rand(ROWS, LENGTH, generator=generator) > 0.3).float()
    return logits.to(dtype), labels, mask


def expected(dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(loss of every position [s, b], gradient of 3 times the sum of those that count)."""
    logits, labels, mask = case(dtype)
    leaf = logits.float().requires_grad_()
    losses = F.cross_entropy(leaf.flatten(0, 1), labels.T.flatten(), reduction="none")
    losses = losses.view(LENGTH, ROWS)
    (3 * losses * mask.T).sum().backward()
    return losses.detach().numpy(), leaf.grad.numpy()


def on_a_rank(tp: int, folder: Path) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """For each dtype: losses, this rank's columns of the gradient, what `token_cross_entropy`
    gives."""
    config = tiny_config("pretrain", folder, folder, tensor_model_parallel_size=tp)
    group = platform.initialize(config).tp_group
    try:
        return [of_dtype(dtype, group) for dtype in ROUNDING]
    finally:
        platform.teardown()


def of_dtype(
    dtype: torch.dtype, group: torch.distributed.ProcessGroup
) -> tuple[np.ndarray, np.ndarray, float]:
    logits, labels, mask = case(dtype)
    shard = logits.chunk(group.size(), dim=2)[group.rank()]
    leaf = shard.clone().requires_grad_()
    head = leaf * 1  # the gradient takes the place of what a head returned
    losses = position_cross_entropy(head, labels.T.contiguous(), group, 4 * shard.shape[2])
    (3 * losses * mask.T).sum().backward()
    total = token_cross_entropy(shard.clone(), labels, mask, group)
    return losses.detach().numpy(), leaf.grad.float().numpy(), float(total)


@pytest.mark.parametrize("tp", [1, 4])
def test_loss_and_gradient_are_those_of_float32_logits(tp, tmp_path):
    """The gradient, rounded to the logits' dtype."""
    ranks = run_ranks(tp, on_a_rank, tp, tmp_path)
    for (dtype, rounding), found in zip(ROUNDING.items(), zip(*ranks, strict=True), strict=True):
        losses, gradient = expected(dtype)
        mask = case(dtype)[2].T.numpy()
        for rank_losses, _, total in found:
            assert np.abs(rank_losses - losses).max() <= 1e-5
            assert total == pytest.approx((losses * mask).sum(), rel=1e-5)
        whole = np.concatenate([part for _, part, _ in found], axis=2)
        assert (np.abs(whole - gradient) <= rounding * np.abs(gradient) + 1e-6).all(), dtype
