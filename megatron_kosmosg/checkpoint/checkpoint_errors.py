"""What a user reads when a checkpoint cannot be written or read: one cause, the same on all ranks.

torch reports both as a CheckpointException, which is no Exception and has the cause on one rank
only; its own archive writer does not say why it failed at all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kosmosg.checkpoint import folder as checkpoint_folder
from megatron_kosmosg.checkpoint.description import read_description
from megatron_kosmosg.checkpoint.plain_data import read_common
from megatron_kosmosg.config.errors import ConfigError

_PROBE_BYTES = 1 << 20


class DamagedCheckpoint(Exception):
    """A checkpoint has its files in full, but their content cannot be read."""


def load_state(path: Path, sharded_state: dict[str, Any], strategy: Any = None) -> dict[str, Any]:
    """What `dist_checkpointing.load` returns.

    Raises, on all ranks or on none, DamagedCheckpoint for tensors that cannot be read and
    ConfigError for a description or a common state that is not plain data, and for tensors of
    another shape than the model's.
    """
    _compare_checksums(path)
    # Every rank reads both before torch does, whose steps would hide the error of one rank.
    read_description(path)
    read_common(path)
    try:
        # It returns a tuple only where its `strict` asks for one.
        return cast(dict[str, Any], dist_checkpointing.load(sharded_state, str(path), strategy))
    except CheckpointException as error:
        if error.args[0] == "read":
            raise DamagedCheckpoint(f"{path} cannot be read: {_cause(error)}") from error
        causes: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(causes, _cause(error))
        unfit = next((cause for cause in causes if "shape mismatch" in cause), None)
        if unfit is None:
            raise RuntimeError(str(error)) from error
        raise ConfigError(
            f"{path} does not fit this model: {unfit}; check the sizes under model"
        ) from error


def _compare_checksums(path: Path) -> None:
    """Every rank reads its share: torch compares none."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: list[list[str]] = [[] for _ in range(world_size)]
    dist.all_gather_object(found, checkpoint_folder.damaged_tensors(path, rank, world_size))
    lines = [line for lines in found for line in lines]
    if lines:
        raise DamagedCheckpoint(f"{path} is damaged: {'; '.join(lines)}")


@contextmanager
def explain_write_errors(folder: Path, iteration: int) -> Iterator[None]:
    """Context in which a checkpoint is written to `folder`: an error of the disk becomes a
    ConfigError that says why."""
    try:
        yield
        return
    except CheckpointException as error:  # raised on all ranks, explained on rank 0
        causes = [_cause(error)]
        dist.broadcast_object_list(causes, src=0)
        reason, problem = causes[0], error
    except OSError as error:
        reason, problem = str(error), error
    except RuntimeError as error:
        reason, problem = _why_not_writable(folder), error
        if reason is None:
            raise
    raise ConfigError(
        f"the checkpoint of iteration {iteration} cannot be written to {folder}: {reason}. Older "
        "ones there are as they were; make room, or set checkpoint.save, and start again"
    ) from problem


def _cause(error: CheckpointException) -> str:
    for rank, (cause, _) in sorted(error.failures.items()):
        return f"rank {rank}: {str(cause).removeprefix('Worker failure: ')}"
    return "another rank failed"


def _why_not_writable(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return str(error)
    return None
