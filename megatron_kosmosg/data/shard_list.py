"""The shards of a dataset, as its manifest lists them: what each is, and in which order they stand.

A shard is a dataset of its own, under a prefix of its own, on any file system. The samples of a
dataset in shards are numbered through them, as if their files were joined in the order of the list.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmosg.config.dataset_prefixes import shard_prefix
from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.config.remote_data import allowed_url
from megatron_kosmosg.data.index_file import index_bytes

MOST_SHARDS = 16_384
"""Each has four files, and Linux maps 65,530 into a process unless vm.max_map_count says more."""
_NUM_NAMED = 5
"""Shards that one message names."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a dataset, as the manifest lists it."""

    path: str
    """Its prefix, from the manifest's folder."""
    first_sample: int
    """Number of its first sample in the dataset."""
    num_samples: int
    num_sequences: int
    num_bytes: int
    """Of its .bin file."""
    fingerprint: str
    """Of its content; see fingerprint.py."""

    def index_bytes(self, has_modes: bool) -> int:
        """Size of its .idx file in bytes."""
        return index_bytes(self.num_sequences, self.num_samples, has_modes)


def numbered(entries: Sequence[ShardEntry]) -> tuple[ShardEntry, ...]:
    """The entries with the first samples that they have in this order."""
    found, first = [], 0
    for entry in entries:
        found.append(dataclasses.replace(entry, first_sample=first))
        first += entry.num_samples
    return tuple(found)


def check_order(entries: Sequence[ShardEntry], num_samples: int) -> None:
    """Raises ValueError where shards are out of order, doubled, or not all there."""
    if len(entries) > MOST_SHARDS:
        raise ValueError(f"{len(entries)} shards, more than {MOST_SHARDS}; write larger ones")
    paths: set[str] = set()
    first = 0
    for place, entry in enumerate(entries):
        if entry.path in paths:
            raise ValueError(f"shard {entry.path} is listed twice")
        if entry.first_sample != first:
            raise ValueError(
                f"shard {entry.path} stands at place {place} and begins at sample "
                f"{entry.first_sample}, but the shards before it hold {first}: the list is out of "
                "order or lacks a shard"
            )
        if entry.num_samples < 1:
            raise ValueError(f"shard {entry.path} holds no samples")
        paths.add(entry.path)
        first += entry.num_samples
    if first != num_samples:
        raise ValueError(f"its shards hold {first} samples, num_samples is {num_samples}")


def check_doubled(entries: Sequence[ShardEntry]) -> None:
    """Raises ValueError where two shards hold the same, under whatever names."""
    contents: dict[str, str] = {}
    for entry in entries:
        other = contents.setdefault(entry.fingerprint, entry.path)
        if other != entry.path:
            raise ValueError(f"shard {entry.path} has the content of shard {other}")


def check_shard_files(
    prefix: str | Path, entries: Sequence[ShardEntry], has_modes: bool
) -> list[int]:
    """The numbers of the shards whose .bin lies in object storage.

    Raises FileNotFoundError or InputError, by name, where files of shards are missing, or have
    another size than the manifest notes: two calls of the file system for a shard, four for one
    whose .bin lies in object storage. That is asked for its size when the shard is first read;
    ConfigError where it may not be read."""
    missing, wrong, remote = [], [], []
    for number, entry in enumerate(entries):
        stored_prefix = shard_prefix(prefix, entry.path)
        for end, size in ((".bin", entry.num_bytes), (".idx", entry.index_bytes(has_modes))):
            try:
                stored = os.stat(f"{stored_prefix}{end}").st_size
            except OSError:
                if end == ".bin" and _lies_elsewhere(f"{stored_prefix}{end}"):
                    remote.append(number)
                else:
                    missing.append(f"{stored_prefix}{end}")
                continue
            if stored != size:
                wrong.append(f"{stored_prefix}{end} has {stored} bytes, not {size}")
    if missing:
        raise FileNotFoundError(
            f"shards of {prefix}: {named(missing)} missing; put back what was moved, or say where "
            f"it is with `kosmosg shards {prefix} SHARD ...`"
        )
    if wrong:
        raise InputError(
            f"shards of {prefix}: {named(wrong)}: a shard is cut, or another has its name; put it "
            "back, or preprocess it again"
        )
    return remote


def _lies_elsewhere(file: str) -> bool:
    """Whether a URL is noted for a missing file. Raises ConfigError for one that may not be
    read."""
    try:
        return bool(allowed_url(file))
    except FileNotFoundError:
        return False


def named(texts: Sequence[str]) -> str:
    """The first few of some names, and how many there are, for a message."""
    shown = ", ".join(texts[:_NUM_NAMED])
    return shown if len(texts) <= _NUM_NAMED else f"{shown} and {len(texts) - _NUM_NAMED} more"
