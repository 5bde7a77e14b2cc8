"""Which prefixes hold the files of a dataset: its own, or those of its shards.

Says nothing of whether they are whole: data/shard_list.py reads the list of shards and checks it.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_kosmosg.config.remote_data import allowed_url, url_path
from megatron_kosmosg.foreign_files import read_json

ENDINGS = (".bin", ".idx")
"""Of the files that every dataset, and every shard of one, has."""


def shard_prefix(prefix: str | Path, path: str) -> str:
    """The prefix of a shard's files, from what the manifest of the dataset `prefix` calls the
    shard; a relative path begins at the manifest's folder."""
    return os.path.join(os.path.dirname(prefix), path)


def stored_prefixes(prefix: str | Path) -> list[str]:
    """The prefixes under which the dataset's files lie: those of the shards that PREFIX.json lists,
    in their order, or `prefix` alone where there are no shards."""
    try:
        paths = [shard["path"] for shard in read_json(Path(f"{prefix}.json"))["shards"]]
        return [shard_prefix(prefix, path) for path in paths] or [str(prefix)]
    except (OSError, ValueError, KeyError, TypeError):
        return [str(prefix)]


def missing_files(prefix: str | Path) -> list[str]:
    """The dataset's .bin and .idx files, or those of its shards, that do not exist. A .bin whose
    URL is noted counts as there."""
    files = [f"{stored}{end}" for stored in stored_prefixes(prefix) for end in ENDINGS]
    absent = [file for file in files if not os.path.isfile(file)]
    return [f for f in absent if not (f.endswith(".bin") and os.path.isfile(url_path(f)))]


def remote_urls(prefix: str | Path) -> list[str]:
    """The URLs of its .bin files that lie in object storage, or of its shards', all of which may be
    read. Raises ConfigError and InputError for the first that may not; nothing is asked for."""
    files = [f"{stored}.bin" for stored in stored_prefixes(prefix)]
    away = [file for file in files if not os.path.isfile(file) and os.path.isfile(url_path(file))]
    return [allowed_url(file) for file in away]
