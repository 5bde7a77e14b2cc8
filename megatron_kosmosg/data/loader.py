"""Micro-batches of one data-parallel rank, read ahead in threads.

Global batch i holds stream positions [i * global_batch_size, (i + 1) * global_batch_size) on every
data-parallel size; balance.py says which rank reads which of them. There is no state beyond the
number of samples consumed.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from torch import Tensor

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.data.balance import by_length, in_stream_order, row_share
from megatron_kosmosg.data.samples import StreamDataset

Batch = dict[str, Tensor]


class MicroBatchIterator(Iterator[Batch]):
    """Endless micro-batches in order; an error while reading is raised by `next`."""

    def __init__(
        self,
        dataset: StreamDataset,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        start_sample: int,
        num_workers: int,
        balance_tokens: bool,
        part: int = 0,
        num_parts: int = 1,
        finish: Callable[[Batch], Batch] | None = None,
    ) -> None:
        """Begins to read ahead where threads are asked for.

        Args:
            start_sample: samples consumed so far by all ranks.
            num_workers: threads that read ahead; with 0 the caller's thread reads.
            balance_tokens: deal the samples of a global batch by length where it matters.
            part: with num_parts, which share of each global batch this iterator reads: every
                num_parts-th micro-batch from `part` on or, where there are fewer micro-batches than
                parts, a part of the rows of each.
            finish: makes of a batch what comes out, in the thread that read it.
        """
        if global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                f"training.global_batch_size={global_batch_size} must be a multiple of "
                f"training.micro_batch_size ({micro_batch_size}) x data-parallel size ({dp_size})"
            )
        if start_sample % global_batch_size:
            raise ConfigError(
                f"{start_sample} consumed samples are not whole global batches of "
                f"{global_batch_size}; training.global_batch_size changed between save and resume"
            )
        self._dataset, self._finish = dataset, finish
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._start_sample = start_sample
        self._balance_tokens = balance_tokens
        self._arranged: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        """(global batch, which of its places are this rank's); the latest one asked for."""
        self._arranging = threading.Lock()
        num_microbatches = global_batch_size // (micro_batch_size * dp_size)
        self._rows, turns = slice(None), range(part, num_microbatches, num_parts)
        if num_microbatches < num_parts:
            self._rows = row_share(micro_batch_size, part, num_parts)
            turns = range(num_microbatches)
        self._numbers = (
            batch * num_microbatches + turn for batch in itertools.count() for turn in turns
        )
        self.wait_seconds = 0.0
        """Seconds that the caller has waited since the last `pop_wait`."""
        self._read_ahead = max(2, 2 * num_workers)
        self._pending: deque[Future[Batch]] = deque()
        self._pool = ThreadPoolExecutor(num_workers, "data-loader") if num_workers > 0 else None

    def positions(self, number: int) -> tuple[list[int], range]:
        """Stream positions of this rank's micro-batch `number`, and of its global batch."""
        step = self._micro_batch_size * self._dp_size
        batch, micro_batch = divmod(number, self._global_batch_size // step)
        start = self._start_sample + batch * self._global_batch_size
        whole = range(start, start + self._global_batch_size)
        with self._arranging:
            if self._arranged[0] != batch:
                self._arranged = (batch, self._arrange(whole))
            places = self._arranged[1][micro_batch]
        return (start + places).tolist(), whole

    def _arrange(self, whole: range) -> np.ndarray:
        """This rank's places in the global batch, int64 [micro-batches, micro_batch_size]."""
        lengths = self._dataset.lengths(whole) if self._balance_tokens else None
        if lengths is None:
            dealt = in_stream_order(len(whole), self._micro_batch_size, self._dp_size)
        else:
            dealt = by_length(lengths, self._micro_batch_size, self._dp_size)
        return dealt[self._dp_rank]

    def prepare(self) -> None:
        """Returns when the first micro-batch is read, which may have to build an index first."""
        if self._pool is not None:
            self._read_on(self._pool)
            self._pending[0].result()

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            if self._pool is None:
                return self._read(next(self._numbers))
            self._read_on(self._pool)
            return self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - started

    def pop_wait(self) -> float:
        """The seconds for which the caller waited for batches since the last call."""
        waited, self.wait_seconds = self.wait_seconds, 0.0
        return waited

    def close(self, *, wait: bool = True) -> None:
        """Ends the threads once each has finished what it is reading; the iterator cannot be used
        any more.

        Args:
            wait: False returns at once.
        """
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=True)

    def _read_on(self, pool: ThreadPoolExecutor) -> None:
        while len(self._pending) < self._read_ahead:
            self._pending.append(pool.submit(self._read, next(self._numbers)))

    def _read(self, number: int) -> Batch:
        local, whole = self.positions(number)
        samples = [self._dataset[position] for position in local[self._rows]]
        batch = self._dataset.collate(samples, self._dataset.pad_to(samples, whole))
        return batch if self._finish is None else self._finish(batch)
