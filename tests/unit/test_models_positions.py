"""Where tokens stand, and the sinusoids, against a computation by hand."""

from __future__ import annotations

import math

import torch

from megatron_kosmosg.models.positions import (
    SinusoidalPositions,
    position_indices,
    sinusoid_table,
)


def test_first_token_stands_at_two_and_padding_at_one() -> None:
    padding = torch.tensor([[False, False, False], [False, True, True]])
    assert position_indices(padding).tolist() == [[2, 3, 4], [2, 1, 1]]


def test_table_is_sines_then_cosines_with_the_padding_row_zero() -> None:
    width, half = 8, 4
    table = sinusoid_table(50, width)
    for row in (2, 3, 17, 49):
        for i in range(half):
            angle = row * math.exp(-i * math.log(10000) / (half - 1))
            assert abs(table[row, i] - math.sin(angle)) < 1e-5
            assert abs(table[row, half + i] - math.cos(angle)) < 1e-5
    assert not table[1].any()


def test_table_grows_and_stays_float32() -> None:
    positions = SinusoidalPositions(6)
    short = positions(torch.zeros(1, 3, dtype=torch.bool))
    long = positions(torch.zeros(2, 40, dtype=torch.bool))
    assert long.shape == (2, 40, 6) and long.dtype == torch.float32
    assert torch.equal(long[0, :3], short[0])
    assert torch.equal(long[0], sinusoid_table(42, 6)[2:])


def test_padding_adds_nothing() -> None:
    mask = torch.tensor([[False, False, True]])
    assert not SinusoidalPositions(4)(mask)[0, 2].any()
