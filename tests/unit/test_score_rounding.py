"""How far the answers of score ranks of unlike kinds may be apart: they round in another order.

The kinds are ways of computing one request: all rows at once or one by one, another memory format,
more threads, bf16. The U-Net in float64 says what is true.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import pytest
import torch

from megatron_kosmosg.config.schema import ScoreConfig
from megatron_kosmosg.models.diffusion import FrozenDiffusion
from megatron_kosmosg.score import roster
from megatron_kosmosg.score.loss import DenoisingLoss
from megatron_kosmosg.score.messages import Answer
from tests.support.tiny_models import (
    CONDITION_WIDTH,
    NUM_QUERIES,
    TARGET_SIZE,
    write_stable_diffusion,
)

ROWS = 6
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: roster.MOST_DIFFERENCE / 2}
"""{dtype of the U-Net: relative distance of a gradient from the true one}. One operation rounds by
up to 6e-8 and 2e-3 of a number; some thirty layers, forward and backward, add up to fifteen and ten
times as much (measured 1e-6 and 0.019), not to fifty and thirteen times. Two answers that are both
within it are no further apart than audits allow."""


@dataclass(frozen=True)
class Hardware:
    """A way to compute a request."""

    by_row: bool = False
    memory_format: torch.memory_format = torch.channels_last
    threads: int = 1


KINDS = (
    Hardware(),
    Hardware(by_row=True),
    Hardware(memory_format=torch.contiguous_format),
    Hardware(threads=3),
    Hardware(True, torch.contiguous_format, 2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_stable_diffusion(tmp_path_factory.mktemp("sd"))


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache
def loaded(folder: Path, dtype: torch.dtype) -> FrozenDiffusion:
    return FrozenDiffusion.from_folder(folder, device=torch.device("cpu"), dtype=dtype)


def answer(folder: Path, dtype: torch.dtype, hardware: Hardware = Hardware()) -> Answer:
    """Of ROWS rows, the same whoever asks."""
    generator = torch.Generator().manual_seed(3)
    condition = torch.randn(ROWS, NUM_QUERIES, CONDITION_WIDTH, generator=generator)
    # Exact in bf16, as it travels.
    condition = condition.bfloat16().float().requires_grad_()
    pixels = torch.rand(ROWS, 3, TARGET_SIZE, TARGET_SIZE, generator=generator) * 2 - 1
    diffusion = loaded(folder, dtype)
    # The VAE is another story: what it makes of an image can be cached, and is the same then.
    moments = loaded(folder, torch.float32).moments(pixels)
    diffusion.unet.to(memory_format=hardware.memory_format)
    denoising, positions = DenoisingLoss(diffusion, ScoreConfig(), 7), torch.arange(ROWS)
    parts = torch.arange(ROWS).split(1 if hardware.by_row else ROWS)
    with num_threads(hardware.threads):
        losses = [
            denoising(condition[rows], moments[rows], positions[rows], "instruct") for rows in parts
        ]
        loss = torch.cat(losses).sum()
        (gradient,) = torch.autograd.grad(loss, condition)
    return Answer(float(loss.detach()), 0, 0, 0.0, 0.0, gradient.flatten())


def distance(one: Answer, other: Answer) -> float:
    return float((one.payload - other.payload).norm() / other.payload.norm())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_answers_of_unlike_kinds_are_as_far_apart_as_rounding_makes_them(folder, dtype):
    true = answer(folder, torch.float64)
    answers = [answer(folder, dtype, kind) for kind in KINDS]
    for found in answers:
        assert 0 < distance(found, true) < BOUNDS[dtype]
        assert found.loss == pytest.approx(true.loss, rel=BOUNDS[dtype])
    pairs = list(combinations(answers, 2))
    assert any(not roster.agree(*pair, bitwise=True) for pair in pairs), "nothing was tried"
    assert all(roster.agree(*pair, bitwise=False) for pair in pairs)


def test_what_is_more_than_rounding_is_no_answer_of_another_kind(folder):
    true = answer(folder, torch.bfloat16)
    for wrong in (1.1 * true.payload, true.payload.roll(1), torch.zeros_like(true.payload)):
        found = Answer(true.loss, 0, 0, 0.0, 0.0, wrong)
        assert not roster.agree(found, true, bitwise=False)
