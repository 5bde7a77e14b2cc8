"""Which checkpoint a run goes on from: its newest that can be read; damaged ones are named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from megatron_kosmosg.checkpoint import folder as checkpoint_folder
from megatron_kosmosg.checkpoint.checkpoint_errors import DamagedCheckpoint
from megatron_kosmosg.checkpoint.save_and_resume import Checkpointer, TrainingProgress
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.paths import save_folder
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel.context import ParallelContext


@dataclass
class Resumed:
    """The checkpoint that a run went on from, and what it holds."""

    path: Path
    progress: TrainingProgress
    differences: list[str]
    """From the config and layout of the checkpoint."""
    passed_over: list[str] = field(default_factory=list)
    """Newer checkpoints that are damaged, and how."""


def newest_checkpoint(config: RunConfig, context: ParallelContext) -> Path | None:
    """This run's newest whole checkpoint as rank 0 sees it, on every rank.

    Raises ConfigError where there are checkpoints and none is whole: a run that begins anew must be
    asked for.
    """
    save = save_folder(config)
    found: list = [None, []]
    if context.rank == 0:
        found = [checkpoint_folder.latest_valid(save), checkpoint_folder.damages(save)]
    dist.broadcast_object_list(found, src=0)
    newest, damaged = found
    if newest is None and damaged:
        raise ConfigError(f"no checkpoint in {save} is whole: {'; '.join(damaged)}. {_ADVICE}")
    return newest


def resume(checkpointer: Checkpointer, context: ParallelContext, newest: Path) -> Resumed:
    """Takes up `newest`, or the one before it where its content cannot be read, and so on.

    What cannot be read is renamed, so that no later start or save takes it for a checkpoint.
    """
    path, passed_over = newest, []
    if context.rank == 0:
        passed_over = checkpoint_folder.damages(newest.parent, newer_than=newest)
    while True:
        try:
            return Resumed(path, *checkpointer.resume(path), passed_over)
        except DamagedCheckpoint as error:
            older = _set_aside(path, context)
            if older is None:
                raise ConfigError(f"{error}. There is no older one. {_ADVICE}") from error
            passed_over.append(f"{error}; it is now {path.name}{checkpoint_folder.DAMAGED}")
            path = older


_ADVICE = "Remove them to begin anew, or set checkpoint.save to another folder"


def _set_aside(path: Path, context: ParallelContext) -> Path | None:
    """The next older checkpoint on every rank, None if there is none: then `path` stays."""
    older: list[Path | None] = [None]
    if context.rank == 0:
        older = [checkpoint_folder.latest_valid(path.parent, older_than=path)]
        if older[0] is not None:
            checkpoint_folder.set_aside(path)
    dist.broadcast_object_list(older, src=0)
    return older[0]
