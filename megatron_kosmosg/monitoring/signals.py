"""A request to stop (SIGTERM, SIGUSR1, Ctrl-C) that all ranks act on at the same iteration.

Slurm and torchrun do not reach every rank at the same moment, and some reach only one; so a signal
sets a flag, and the ranks agree on it at the end of each iteration and of each evaluation batch.
Long work of one rank alone (the first data build) is left at once. Another Ctrl-C some seconds
later interrupts everything (torchrun repeats the first one to its ranks within a moment).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SAME_REQUEST_SECONDS = 3.0
"""An interrupt that follows another within this time is its echo."""


Result = TypeVar("Result")


class _Left(BaseException):
    """Ends the work of `StopRequest.run_alone`."""


class StopRequest:
    """Context manager: inside it the stop signals only leave a note."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._noted_at = 0.0
        self._is_alone = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device) -> bool:
        """True on every rank when any rank got a signal; a collective over all ranks."""
        flag = torch.tensor([int(self.received is not None)], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def run_alone(self, work: Callable[[], Result]) -> Result | None:
        """What `work` returns, or None if a signal came before its end; it is then left at once.

        For work of this rank without collectives. Ask `agreed` afterwards: the other ranks may
        have had no signal.
        """
        if self.received is not None:
            return None
        self._is_alone = True
        try:
            return work()
        except _Left:
            return None
        finally:
            self._is_alone = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_repeated = self.received == signal.SIGINT and number == signal.SIGINT
        if is_repeated and time.monotonic() - self._noted_at > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._noted_at = signal.Signals(number), time.monotonic()
        if self._is_alone:
            self._is_alone = False
            raise _Left
