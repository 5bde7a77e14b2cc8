"""Micro-batches that are looked at before their turn come in their turn, and count then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_kosmosg.parallel.context import single_process_context
from megatron_kosmosg.training.batches import BatchFeed
from tests.support.tiny_models import tiny_config
from tests.support.tiny_stream import TinyStream

NUM_UPDATES, AN_UPDATE = 3, 2
"""Of two micro-batches each."""


def feed(tmp_path: Path, num_updates: int | None = NUM_UPDATES) -> Iterator[BatchFeed]:
    config = tiny_config("instruct", tmp_path / "sd", tmp_path / "run")
    made = BatchFeed(
        TinyStream("instruct"), config, single_process_context("cpu"), 4, num_updates=num_updates
    )
    yield made
    made.close()


looking = pytest.fixture(feed, name="looking")
plain = pytest.fixture(feed, name="plain")


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in expected
    )


def test_a_look_ahead_changes_neither_what_comes_nor_when_it_counts(looking, plain):
    for number in range(NUM_UPDATES * AN_UPDATE):
        expected = next(plain)
        if number % 3 != 1:
            seen = looking.peek()
            assert seen is looking.peek(), "it is read once"
        found = next(looking)
        assert equal(found, expected)
        assert number % 3 == 1 or found is seen
        looking.peek()
        assert looking.pop_work() == plain.pop_work(), "what was only looked at counts later"


def test_nothing_is_read_behind_the_last_update(looking):
    for _ in range(NUM_UPDATES * AN_UPDATE):
        assert looking.peek() is not None
        next(looking)
    assert looking.peek() is None


def test_what_is_put_into_a_batch_that_was_looked_at_comes_with_it(looking):
    seen = looking.peek()
    seen["pixel_values"] = seen["pixel_values"].half()
    assert next(looking)["pixel_values"].dtype is torch.float16
