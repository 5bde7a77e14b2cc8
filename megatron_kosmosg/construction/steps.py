"""Runs the steps, one after the other, over this process's shards; finished shards are skipped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_kosmosg.construction.on_demand import OnDemand
from megatron_kosmosg.construction.step_rows import Row, StepFolder
from megatron_kosmosg.launcher import RankInfo

StepProgress = Callable[[str, int, int], None]
"""Called with (name of the step, finished, to do) shards of this process, first with 0."""


class StepWork(Protocol):
    """What a step does: it makes rows of the images of a shard."""

    def rows(self, shard: int) -> Iterator[Row]:
        """A row for each image that reached the step."""
        ...


@dataclass(frozen=True)
class Step:
    """One step of a run, and the folder of its rows."""

    folder: StepFolder
    work: StepWork
    settings: dict[str, Any]
    """Everything that its rows depend on, besides the step before it."""
    model: OnDemand[Any] | None = None
    """What it may hold in memory."""


def run_steps(
    steps: Sequence[Step], num_shards: int, rank_info: RankInfo, report: StepProgress
) -> None:
    """Finishes this process's shards.

    Raises ValueError before any work if the folder of a step was begun with other settings.
    """
    before = ""
    for step in steps:
        settings = step.settings | {"settings of the step before": before}
        step.folder.begin(settings)
        before = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    for step in steps:
        todo = step.folder.shards.to_do(rank_info.share(num_shards))
        name = step.folder.path.name
        report(name, 0, len(todo))
        for done, shard in enumerate(todo, start=1):
            step.folder.write(shard, step.work.rows(shard))
            report(name, done, len(todo))
        if step.model is not None:
            step.model.release()


def are_done(steps: Sequence[Step], num_shards: int) -> bool:
    """Whether every process has finished all of these steps."""
    return not any(step.folder.shards.to_do(range(num_shards)) for step in steps)
