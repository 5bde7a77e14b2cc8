"""Which prefixes hold the files of a dataset: its own, or those of its shards.

Says nothing of whether they are whole: data/shard_list.py reads the list of shards and checks it.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_kosmosg.foreign_files import read_json

ENDINGS = (".bin", ".idx")
"""Of the files that every dataset, and every shard of one, has."""


def shard_prefix(prefix: str | Path, path: str) -> str:
    """Of a shard that the manifest of `prefix` names; a relative path begins at its folder."""
    return os.path.join(os.path.dirname(prefix), path)


def stored_prefixes(prefix: str | Path) -> list[str]:
    """Of the shards that PREFIX.json lists, in their order; else `prefix` alone."""
    try:
        paths = [shard["path"] for shard in read_json(Path(f"{prefix}.json"))["shards"]]
        return [shard_prefix(prefix, path) for path in paths] or [str(prefix)]
    except (OSError, ValueError, KeyError, TypeError):
        return [str(prefix)]


def missing_files(prefix: str | Path) -> list[str]:
    """Of its .bin and .idx files, or of its shards', those that are not there."""
    files = [f"{stored}{end}" for stored in stored_prefixes(prefix) for end in ENDINGS]
    return [file for file in files if not os.path.isfile(file)]
