"""The ranks of an MPI job as workers; mpi4py is imported only under a launcher of several tasks.

Items go round the ranks in turn. Rank 0 hears of every finished item, so that it can show progress
and stop the others; the results reach all ranks at the end.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_kosmosg.launcher import find_tasks
from megatron_kosmosg.preprocess.workers import Done, Item, LocalWorkers, Result, Workers

if TYPE_CHECKING:
    from mpi4py import MPI

_RESULT, _STOP = 1, 2


def choose_workers(size: int | None, environment: Mapping[str, str] | None = None) -> Workers:
    """MPI ranks under a launcher of several tasks, else `size` (None: 1) processes.

    The launcher shows in `environment`, None: os.environ.

    Raises ValueError when tasks were started that MPI does not join into one world: each would do
    all of the work, over each other.
    """
    if size is not None and size < 1:
        raise ValueError(f"--workers {size} must be at least 1")
    tasks, name = find_tasks(environment)
    if tasks <= 1:
        return LocalWorkers(size or 1)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"started as one of {tasks} tasks, which needs mpi4py and an MPI library: pip install "
            f"'megatron-kosmosg[mpi]' ({error})"
        ) from error
    world = MPI.COMM_WORLD
    if world.size != tasks:
        library = MPI.Get_library_version().splitlines()[0].strip()[:40]
        raise ValueError(
            f"the launcher started {tasks} tasks ({name}), but MPI ({library}) sees {world.size}: "
            "each would do all of the work; use the mpirun of this MPI library, or under Slurm "
            "`srun --mpi=pmi2` (see `srun --mpi=list`)"
        )
    if size is not None:
        raise ValueError("under MPI every task is one worker; leave --workers out")
    return MpiWorkers(world)


class MpiWorkers:
    """Workers that are the ranks of an MPI job."""

    def __init__(self, world: MPI.Comm) -> None:
        self._world = world
        self.size = world.size
        self.is_leader = world.rank == 0

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        done: Done[Result] | None = None,
    ) -> list[Result]:
        """The function's results for the items, in their order (Workers.map)."""
        local = range(self._world.rank, len(items), self.size)
        if self.is_leader:
            attempt = self._map_as_leader(function, items, local, done)
        else:
            self._map_as_follower(function, items, local)
            attempt = None
        return _value(self._world.bcast(attempt))

    def lead(self, function: Callable[[], Result]) -> Result:
        """The result of a function that one rank alone calls (Workers.lead)."""
        attempt = _attempt(function) if self.is_leader else None
        return _value(self._world.bcast(attempt))

    def _map_as_leader(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        local: range,
        done: Done[Result] | None,
    ) -> tuple[Any, Exception | None]:
        results: dict[int, Result] = {}
        error: Exception | None = None
        ended = 0

        def take(number: int, attempt: tuple[Any, Exception | None]) -> None:
            nonlocal error
            results[number], failure = attempt
            if failure is None and error is None and done is not None:
                _, failure = _attempt(partial(done, len(results), attempt[0]))
            if failure is not None and error is None:
                error = failure
                for rank in range(1, self.size):
                    self._world.isend(None, rank, _STOP)

        def listen() -> None:
            nonlocal ended
            number, attempt = self._world.recv(tag=_RESULT)
            if number is None:
                ended += 1
            else:
                take(number, attempt)

        for number in local:
            if error is None:
                take(number, _attempt(lambda item=items[number]: function(item)))
            while self._world.iprobe(tag=_RESULT):
                listen()
        while ended < self.size - 1:
            listen()
        if error is not None:
            return None, error
        return [results[number] for number in range(len(items))], None

    def _map_as_follower(
        self, function: Callable[[Item], Result], items: Sequence[Item], local: range
    ) -> None:
        for number in local:
            if self._world.iprobe(source=0, tag=_STOP):
                break
            attempt = _attempt(lambda item=items[number]: function(item))
            self._world.send((number, attempt), 0, _RESULT)
        self._world.send((None, None), 0, _RESULT)


def _attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except (ValueError, OSError) as error:
        return None, error
    except Exception:
        # A defect of ours: the other ranks would wait for this one forever.
        traceback.print_exc()
        sys.stderr.flush()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
        raise


def _value(attempt: tuple[Any, Exception | None]) -> Any:
    result, error = attempt
    if error is not None:
        raise error
    return result
