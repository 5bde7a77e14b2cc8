"""Speeds: warmed up, timed between two points at which the device is idle, at the best batch."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

ENOUGH = 1.02
"""A larger batch must be this much faster to be worth its memory."""


@dataclass(frozen=True)
class Speed:
    """Of one batch size."""

    batch: int
    per_second: float
    """Items: `batch` times calls a second."""
    seconds: float
    """Of one call."""
    calls: int
    """That were timed."""
    peak_gib: float | None
    """Of the device's memory; None on a CPU."""

    def details(self) -> dict[str, float | int | str]:
        """For a row."""
        found: dict[str, float | int | str] = {"batch": self.batch, "ms": 1e3 * self.seconds}
        return found if self.peak_gib is None else found | {"peak GiB": self.peak_gib}


def speed(
    call: Callable[[], object], batch: int, device: torch.device, budget: float, warm_up: int = 2
) -> Speed:
    """Calls for about `budget` seconds after `warm_up` calls."""
    on_gpu = device.type != "cpu"
    for _ in range(warm_up):
        call()
    wait_for_device(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - started < budget:
        call()
        calls += 1
        if not calls % 4:
            wait_for_device(device)  # else the host would run ahead of the clock
    wait_for_device(device)
    seconds = (time.perf_counter() - started) / calls
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    return Speed(batch, batch / seconds, seconds, calls, peak)


def best_batch(measure: Callable[[int], Speed], batches: Iterable[int]) -> tuple[Speed, str]:
    """The fastest of ascending batches, tried until memory or the gain ends; and what was seen.

    Raises what the first one raises.
    """
    best: Speed | None = None
    seen = []
    for batch in batches:
        try:
            found = measure(batch)
        except torch.OutOfMemoryError:
            if best is None:
                raise
            seen.append(f"{batch}: out of memory")
            break
        finally:
            free_memory()
        seen.append(f"{batch}: {found.per_second:.4g}")
        if best is not None and found.per_second < ENOUGH * best.per_second:
            break
        best = found
    if best is None:
        raise ValueError("no batch was tried")
    return best, ", ".join(seen)


def free_memory() -> None:
    """Gives back what a failed or a finished try held on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for_device(device: torch.device) -> None:
    """Returns when all that this process gave `device` to do is done."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)
