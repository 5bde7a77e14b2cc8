"""Which rank is slower than the others: own time of each rank before gradients are added up.

Data-parallel ranks wait for each other only there. Ranks of one replica wait for each other before
it, so a slow one shows in the time of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_kosmosg.launcher import find_rank_info, node_name
from megatron_kosmosg.monitoring.stopwatch import Stopwatch
from megatron_kosmosg.parallel.context import ParallelContext


class Stragglers:
    """Times this rank's forward and backward passes; compares the ranks every `interval`."""

    def __init__(
        self, chunks: list[DistributedDataParallel], context: ParallelContext, interval: int
    ) -> None:
        """Hooks into the end of the backward passes. Collective over all decoder ranks.

        Args:
            chunks: the wrapped model, whose finalize_model_grads_func must be set already
                (`configure_schedules`).
            interval: iterations between two reports.
        """
        self._context, self._interval = context, interval
        self._watch = Stopwatch(context.device)
        self._seconds: list[float] = []
        for chunk in chunks:
            finish = cast(Callable[..., Any], chunk.config.finalize_model_grads_func)
            chunk.config.finalize_model_grads_func = self._stopping_before(finish)
        places: list[tuple[int, str]] = [(0, "")] * context.world_size
        node = node_name()
        # As the launcher counts: torch.distributed's ranks leave score ranks out.
        dist.all_gather_object(places, (find_rank_info().rank, node))
        self._ranks = [rank for rank, _ in places]
        self.nodes = dict(places)
        """{rank: name of its node}."""

    def start(self) -> None:
        """Begins the time of an iteration; call it when one begins."""
        self._watch.start()

    def report(self, iteration: int) -> dict[str, float]:
        """Every `interval` iterations, on every rank: `slowest_rank`, its own time as a multiple
        of the median (`slowest_rank_ratio`), and that median in seconds; else empty."""
        self._seconds.append(self._watch.seconds())
        if self._context.world_size == 1 or iteration % self._interval:
            return {}
        mean = sum(self._seconds) / len(self._seconds)
        self._seconds.clear()
        local = torch.tensor([mean], dtype=torch.float64, device=self._context.device)
        gathered = [torch.empty_like(local) for _ in range(self._context.world_size)]
        dist.all_gather(gathered, local)
        return straggler_metrics(dict(zip(self._ranks, torch.cat(gathered).tolist(), strict=True)))

    def _stopping_before(self, finish: Callable[..., Any]) -> Callable[..., Any]:
        def stop_and_finish(*arguments: Any, **named: Any) -> Any:
            self._watch.stop()
            return finish(*arguments, **named)

        return stop_and_finish


def straggler_metrics(seconds: dict[int, float]) -> dict[str, float]:
    """The fields of the metrics for {rank: its own time}."""
    median = sorted(seconds.values())[(len(seconds) - 1) // 2]
    slowest = max(seconds, key=seconds.__getitem__)
    return {
        "slowest_rank": slowest,
        "slowest_rank_ratio": seconds[slowest] / max(median, 1e-9),
        "median_rank_seconds": median,
    }
