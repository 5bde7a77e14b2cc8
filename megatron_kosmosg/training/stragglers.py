"""Which rank is slower than the others: own time of each rank before gradients are added up.

Data-parallel ranks wait for each other only there. Ranks of one replica wait for each other before
it, so a slow one shows in the time of all of them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.parallel.stopwatch import Stopwatch


class Stragglers:
    """Times this rank's forward and backward passes; compares the ranks every `interval`."""

    def __init__(
        self, chunks: list[DistributedDataParallel], layout: Layout, interval: int
    ) -> None:
        """chunks: after `connect`."""
        self._layout, self._interval = layout, interval
        self._watch = Stopwatch(layout.device)
        self._seconds: list[float] = []
        for chunk in chunks:
            finish = chunk.config.finalize_model_grads_func
            chunk.config.finalize_model_grads_func = self._stopping_before(finish)
        self.nodes: list[str] = [""] * layout.world_size
        """Name of each rank's node."""
        own = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        dist.all_gather_object(self.nodes, own)

    def start(self) -> None:
        """Call when an iteration begins."""
        self._watch.start()

    def report(self, iteration: int) -> dict[str, float]:
        """Every `interval` iterations, on every rank: `slowest_rank`, its own time as a multiple
        of the median (`slowest_rank_ratio`), and that median in seconds; else empty."""
        self._seconds.append(self._watch.seconds())
        if self._layout.world_size == 1 or iteration % self._interval:
            return {}
        mean = sum(self._seconds) / len(self._seconds)
        self._seconds.clear()
        own = torch.tensor([mean], dtype=torch.float64, device=self._layout.device)
        gathered = [torch.empty_like(own) for _ in range(self._layout.world_size)]
        dist.all_gather(gathered, own)
        return compare(torch.cat(gathered).tolist())

    def _stopping_before(self, finish: Callable[..., Any]) -> Callable[..., Any]:
        def stop_and_finish(*arguments: Any, **named: Any) -> Any:
            self._watch.stop()
            return finish(*arguments, **named)

        return stop_and_finish


def compare(seconds: list[float]) -> dict[str, float]:
    """The fields of the metrics for the own times of all ranks, in rank order."""
    median = sorted(seconds)[(len(seconds) - 1) // 2]
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return {
        "slowest_rank": slowest,
        "slowest_rank_ratio": seconds[slowest] / max(median, 1e-9),
        "median_rank_seconds": median,
    }
