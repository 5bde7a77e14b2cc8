"""Measured against planned: one line of the log, when a run has settled.

Its own file because planning stands above training: a plan comes as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_kosmosg.parallel.devices import peak_gib

COMPARED_AT, _WARM_UP = 50, 10
"""Iterations of a start after which it is compared, and how many of them do not count."""


@dataclass(frozen=True)
class PlannedRun:
    """The planned figures that measured ones are compared with."""

    gpu: str
    samples_per_second: float
    memory_gib: float
    """Of rank 0."""


class AgainstPlan:
    """The comparison of one start of a run; says nothing without a plan."""

    def __init__(self, planned: PlannedRun | None, batch: int, device: torch.device) -> None:
        self._planned, self._batch, self._device = planned, batch, device
        self._iterations, self._seconds = 0, 0.0

    def after(self, seconds: float) -> str | None:
        """Counts an iteration of `seconds`; the line, once."""
        self._iterations += 1
        if self._planned is None or self._iterations > COMPARED_AT:
            return None
        if self._iterations > _WARM_UP:
            self._seconds += seconds
        if self._iterations < COMPARED_AT:
            return None
        planned, speed = self._planned, self._batch * (COMPARED_AT - _WARM_UP) / self._seconds
        line = (
            f"measured against planned for {planned.gpu}: {speed:,.1f} samples/s, planned "
            f"{planned.samples_per_second:,.1f} ({speed / planned.samples_per_second:.2f} x)"
        )
        taken = peak_gib(self._device)
        if taken is not None:
            line += f"; rank 0 takes {taken:.1f} GiB, planned {planned.memory_gib:.1f}"
        return line
