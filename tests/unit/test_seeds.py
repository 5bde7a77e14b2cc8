"""tests/conftest.py: what a test draws is the same in every run, in whatever order."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


def draw() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


@pytest.fixture(scope="module")
def drawn_by_a_fixture() -> list[float]:
    return draw()


@pytest.mark.parametrize(
    ("case", "expected"),
    [("a", [0.207885, 0.762618, 0.230211]), ("b", [0.893391, 0.344636, 0.226786])],
    ids="ab",
)
def test_each_case_draws_its_own_numbers(case, expected, drawn_by_a_fixture):
    assert draw() == pytest.approx(expected, abs=1e-6)
    assert drawn_by_a_fixture == pytest.approx([0.972657, 0.061972, 0.864843], abs=1e-6)
