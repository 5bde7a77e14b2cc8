"""Time that this process's device takes between two points of the program."""

from __future__ import annotations

import time

import torch

from megatron_kosmosg.parallel.devices import has_stream, timing_event


class Stopwatch:
    """Measures time with `start`, `stop`, then `seconds`; on a GPU the time of its stream, without
    waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.Event] = []
        if has_stream(device):
            self._events = [timing_event() for _ in range(2)]
        self._times = [0.0, 0.0]

    def start(self) -> None:
        self._note(0)

    def stop(self) -> None:
        self._note(1)

    def seconds(self) -> float:
        """Waits until the device has passed the `stop`."""
        if self._events:
            if not self._events[1].query():
                self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._times[1] - self._times[0]

    def _note(self, index: int) -> None:
        if self._events:
            self._events[index].record()
        else:
            self._times[index] = time.perf_counter()
