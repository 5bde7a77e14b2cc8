"""Who does the work: the processes of this machine, or (mpi_workers.py) the ranks of an MPI job.

Every process of a run executes the same code; `map` shares the items out, `lead` is done by one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Done = Callable[[int, Result], None]
"""Called with (number of finished items, the latest result) where the leader is; it may raise."""


class Workers(Protocol):
    """Shares work out. Errors of one process are raised in all."""

    is_leader: bool
    size: int

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        done: Done[Result] | None = None,
    ) -> list[Result]:
        """The results in the order of `items`, everywhere."""
        ...

    def lead(self, function: Callable[[], Result]) -> Result:
        """The result of calling `function` in one process, everywhere."""
        ...


class LocalWorkers:
    """Processes of this machine; with `size` 1 none but this one."""

    is_leader = True

    def __init__(self, size: int) -> None:
        self.size = size

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        done: Done[Result] | None = None,
    ) -> list[Result]:
        """The function's results for the items, in their order (Workers.map). Raises ValueError
        when a process dies."""
        results: list[Result] = []

        def take(result: Result) -> None:
            results.append(result)
            if done is not None:
                done(len(results), result)

        num_processes = min(self.size, len(items))
        if num_processes <= 1:
            for item in items:
                take(function(item))
            return results
        # fork: the workers start with everything imported.
        context = multiprocessing.get_context("fork")
        reading, writing = os.pipe()
        pool = ProcessPoolExecutor(num_processes, context, _end_with_parent, (reading, writing))
        try:
            with _interrupt_held_back():
                found = pool.map(function, items)
            for result in found:
                take(result)
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process ended unexpectedly (killed, perhaps out of memory); try fewer "
                "--workers, and --resume to go on from where it was"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
            os.close(reading)
            os.close(writing)
        return results

    def lead(self, function: Callable[[], Result]) -> Result:
        """The result of a function that one process alone calls (Workers.lead)."""
        return function()


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Holds Ctrl-C back while the workers are forked, who inherit that until they ignore it.

    One that met it in between would die, and the run be said to have lost a worker.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(reading: int, writing: int) -> None:
    """Makes this worker end when its parent is killed, so that nobody writes behind a restart.

    Only the parent keeps the writing end open: the pipe is at its end when the parent is gone.
    """
    os.close(writing)
    # Ctrl-C reaches every process; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def wait() -> None:
        os.read(reading, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
