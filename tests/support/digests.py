"""Digests of what runs and datasets hold, without this package: equal in every version of it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

NOT_PARAMETERS = ("optimizer.", "rng/")
"""Begin the keys of a checkpoint that belong to no parameter."""


def newest_checkpoint(run: Path) -> Path:
    """The last `iter_XXXXXXX` folder of a run that no save or check has marked as unfinished."""
    return max(path for path in (run / "checkpoints").glob("iter_*") if not path.suffix)


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """All parameters of a checkpoint, by name."""
    reader = checkpoint.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(tuple(value.size), dtype=value.properties.dtype)
        for key, value in stored.items()
        if isinstance(value, TensorStorageMetadata) and not key.startswith(NOT_PARAMETERS)
    }
    with warnings.catch_warnings():  # that one process reads is meant
        warnings.simplefilter("ignore", UserWarning)
        checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state


def parameters_digest(folder: Path) -> str:
    """sha256 over name, dtype, shape and bytes of all parameters of a checkpoint, by name."""
    state, whole = parameters(folder), hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def sample_digest(info: dict[str, Any], parts: Sequence[np.ndarray], modes: Iterable[int]) -> str:
    """sha256 over one stored sample: its JSON part, then mode, dtype and bytes of every other."""
    whole = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for part, mode in zip(parts, modes, strict=True):
        whole.update(f"{int(mode)} {part.dtype.str} {part.shape}\n".encode())
        whole.update(np.ascontiguousarray(part).tobytes())
    return whole.hexdigest()


def array_digest(array: np.ndarray | None) -> str | None:
    """sha256 over dtype, shape and bytes; None stays None."""
    if array is None:
        return None
    whole = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode())
    whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def iterations(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics that belong to a training iteration, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]
