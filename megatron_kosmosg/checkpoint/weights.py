"""Model weights from a checkpoint of any layout, strictly: every key read once or listed absent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.transformer.module import MegatronModule

from megatron_kosmosg.checkpoint.base_checkpoint import weight_folders
from megatron_kosmosg.checkpoint.checkpoint_errors import DamagedCheckpoint, load_state
from megatron_kosmosg.checkpoint.folder import CONFIG_FILE
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_saved_config

MODEL = "model"
"""What the names of the model's chunks in a checkpoint's state begin with."""


def model_state(chunks: Sequence[MegatronModule], metadata: dict) -> dict[str, ShardedStateDict]:
    """The model's state as {chunk name: sharded tensors by key}; the keys do not depend on the
    layout.

    Per-layer `_extra_state` objects (Transformer Engine's FP8 history) are left out.
    """
    return {
        f"{MODEL}{index}": {
            name: value
            for name, value in chunk.sharded_state_dict(metadata=metadata).items()
            if not name.endswith("_extra_state")
        }
        for index, chunk in enumerate(chunks)
    }


def set_model_state(chunks: Sequence[MegatronModule], state: dict[str, dict]) -> None:
    """Loads what `dist_checkpointing.load` returned for `model_state`; every tensor must match."""
    for index, chunk in enumerate(chunks):
        current = chunk.state_dict()
        extra = {name: value for name, value in current.items() if name.endswith("_extra_state")}
        chunk.load_state_dict({**extra, **state[f"{MODEL}{index}"]}, strict=True)


def load_weights(
    path: Path,
    chunks: Sequence[MegatronModule],
    metadata: dict,
    absent: Sequence[str] = (),
    unused: Sequence[str] = (),
    stage: str | None = None,
    new: Sequence[str] = (),
) -> None:
    """Fills the bare chunks from the checkpoint folder `path`; a collective over all ranks.

    Args:
        absent: prefixes of model keys that the checkpoint must not have (they keep their values).
        unused: prefixes of checkpoint keys that the model must not have.
        stage: the stage that must have written the checkpoint; None takes any.
        new: ends of model keys that the checkpoint may lack (those keep their values).

    Raises:
        ConfigError: names the stage or the keys that break these rules.
    """
    written_by = load_saved_config(path / CONFIG_FILE).stage
    if stage is not None and written_by != stage:
        raise ConfigError(
            f"checkpoint.load: {path} was written by stage {written_by}, but this run starts from "
            f"a {stage} checkpoint; set checkpoint.load to a {stage} run (or "
            f"checkpoint.load_stage={written_by} where the stage can start from it)"
        )
    state = model_state(chunks, metadata)
    folders = weight_folders(path)
    stored = set(folders)
    model_keys = _keys_of_all_ranks(state)
    started = {key for key in model_keys - stored if key.endswith(tuple(new))}
    _check_keys(path, written_by, model_keys - started, stored, tuple(absent), tuple(unused))
    loaded = read_model_state(state, folders)
    for chunk, entries, found in zip(chunks, state.values(), loaded.values(), strict=True):
        current = chunk.state_dict()
        found.update({name: current[name] for name in entries if name not in found})
    set_model_state(chunks, loaded)


def read_model_state(
    state: dict[str, ShardedStateDict], folders: dict[str, Path]
) -> dict[str, dict]:
    """The values of those entries of `model_state` that `folders` has, each read from the folder
    under its key; a collective over all ranks. Raises ConfigError for a damaged one."""
    loaded: dict[str, dict] = {name: {} for name in state}
    for folder in dict.fromkeys(folders.values()):
        part = {name: select(entries, folders, folder) for name, entries in state.items()}
        try:
            found = load_state(folder, part)
        except DamagedCheckpoint as error:
            raise ConfigError(f"{error}; set checkpoint.load to another checkpoint") from error
        for name, values in loaded.items():
            values.update(found.get(name, {}))
    return loaded


def select(
    entries: dict[str, ShardedBase], folders: dict[str, Path], folder: Path
) -> dict[str, ShardedBase]:
    """The entries that lie in `folder`."""
    return {name: value for name, value in entries.items() if folders.get(value.key) == folder}


def _keys_of_all_ranks(state: dict[str, ShardedStateDict]) -> set[str]:
    local = {value.key for part in state.values() for value in part.values()}
    gathered: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, local)
    return set().union(*gathered)


def _check_keys(
    path: Path,
    written_by: str,
    model: set[str],
    stored: set[str],
    absent: tuple[str, ...],
    unused: tuple[str, ...],
) -> None:
    problems = {
        "weights of this model that the checkpoint lacks": {
            key for key in model - stored if not key.startswith(absent)
        },
        "weights expected to be absent that the checkpoint has": {
            key for key in model & stored if key.startswith(absent)
        },
        "weights in the checkpoint that this model has no place for": {
            key for key in stored - model if not key.startswith(unused)
        },
        "weights expected to be unused that the model has": {
            key for key in model & stored if key.startswith(unused)
        },
    }
    found = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:4])}{', ...' if len(keys) > 4 else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise ConfigError(
            f"checkpoint {path} (written by stage {written_by}) does not fit this model:\n  "
            + "\n  ".join(found)
            + "\ncheck checkpoint.load and the sizes under model"
        )
