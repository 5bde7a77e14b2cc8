"""The loader: order, read-ahead, errors, and an end."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from megatron_kosmosg.data.loader import MicroBatchIterator


class Numbers:
    """A stream whose samples are their positions."""

    def __init__(self, fail_at: int | None = None, delay: float = 0.0) -> None:
        self.fail_at, self.delay = fail_at, delay
        self.read: list[int] = []
        self.global_ranges: set[range] = set()
        self.sizes: np.ndarray | None = None

    def __getitem__(self, position):
        if position == self.fail_at:
            raise RuntimeError(f"no sample {position}")
        time.sleep(self.delay)
        self.read.append(position)
        return position

    def fingerprints(self):
        return {}

    def lengths(self, positions):
        return (
            self.sizes[np.asarray(positions) % len(self.sizes)] if self.sizes is not None else None
        )

    def pad_to(self, samples, global_positions):
        self.global_ranges.add(global_positions)
        return 1

    def collate(self, samples, pad_to):
        return {"tokens": torch.tensor(samples)}


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("data-loader")]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_ranks_share_each_global_batch_in_the_agreed_order(num_workers):
    batches = []
    for rank in range(2):
        loader = MicroBatchIterator(Numbers(delay=0.001), 12, 3, rank, 2, 24, num_workers, True)
        batches.append([next(loader)["tokens"].tolist() for _ in range(4)])
        loader.close()
    assert batches[0] == [[24, 25, 26], [30, 31, 32], [36, 37, 38], [42, 43, 44]]
    assert batches[1] == [[27, 28, 29], [33, 34, 35], [39, 40, 41], [45, 46, 47]]


def test_padding_is_told_the_whole_global_batch():
    numbers = Numbers()
    loader = MicroBatchIterator(numbers, 4, 2, 1, 2, 8, 0, True)
    next(loader)
    next(loader)
    assert numbers.global_ranges == {range(8, 12), range(12, 16)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_while_reading_reaches_the_caller_after_the_good_batches(num_workers):
    loader = MicroBatchIterator(Numbers(fail_at=5), 2, 2, 0, 1, 0, num_workers, True)
    assert [next(loader)["tokens"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(RuntimeError, match="no sample 5"):
        next(loader)
    assert not loader_threads()


def test_close_ends_the_threads_and_stops_reading():
    numbers = Numbers(delay=0.005)
    loader = MicroBatchIterator(numbers, 1, 1, 0, 1, 0, 2, True)
    next(loader)
    assert loader_threads()
    loader.close()
    loader.close()
    assert not loader_threads()
    read = len(numbers.read)
    time.sleep(0.05)
    assert len(numbers.read) == read < 20


def test_reads_ahead_only_so_far_and_waits_are_counted():
    numbers = Numbers(delay=0.02)
    loader = MicroBatchIterator(numbers, 1, 1, 0, 1, 0, 1, True)
    next(loader)
    assert loader.pop_wait() >= 0.015 and loader.wait_seconds == 0
    time.sleep(0.3)
    assert len(numbers.read) <= 3
    next(loader)
    assert loader.pop_wait() < 0.015, "it was read while the caller was busy"
    loader.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 3, 0, 2, 0, 0, True), "must be a multiple"),
        ((12, 3, 0, 2, 5, 0, True), "not whole global batches"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MicroBatchIterator(Numbers(), *arguments)
