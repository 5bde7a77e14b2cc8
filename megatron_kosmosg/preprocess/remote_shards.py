"""Notes that the .bin files of shards were copied to object storage, once the copies are compared.

A local file is deleted only where that is asked for, and after its copy has been noted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_kosmosg.config.dataset_prefixes import shard_prefix
from megatron_kosmosg.config.errors import ConfigError, InputError
from megatron_kosmosg.config.remote_data import allowed_url, check_allowed, url_path, write_url
from megatron_kosmosg.data.fingerprint import StoredFile, fingerprint_of
from megatron_kosmosg.data.in_threads import results_in_order
from megatron_kosmosg.data.manifest import Manifest, manifest_path
from megatron_kosmosg.data.remote_file import RemoteFile
from megatron_kosmosg.data.shard_list import ShardEntry, named
from megatron_kosmosg.files import temporary_name

_SHARDS_TOGETHER = 8
_STRETCH = 16 << 20
"""Bytes that are compared at a time."""


@dataclass(frozen=True)
class NotedCopy:
    """What became of one shard."""

    shard: str
    """Its prefix."""
    url: str
    problem: str | None
    """Why its copy is not noted."""
    is_deleted: bool = False
    """Whether the local file is gone."""


def note_copies(
    prefix: str, shards: Sequence[str], folder_url: str, verify: str | None, delete_local: bool
) -> Iterator[NotedCopy]:
    """Compares the copies FOLDER_URL/NAME.bin of the shards with the list PREFIX.json, one after
    the other, and notes those that are right.

    Args:
        shards: prefixes of those that were copied; empty for all.
        verify: "size"; "blocks" compares the fingerprint, too; "whole" every byte with SHARD.bin,
            where that is still there. None: "whole" before a deletion, else "size".
        delete_local: deletes SHARD.bin of a shard that is noted; "blocks" at least are compared.

    Raises InputError for shards that the list does not have or that would have one URL, and
    ConfigError for a folder that may not be read, before anything is noted.
    """
    manifest = Manifest.read(manifest_path(prefix))
    if not manifest.shards:
        raise InputError(
            f"{prefix} is a dataset in one piece; `kosmosg shards LIST {prefix}` makes a list of it"
        )
    listed = {os.path.abspath(shard_prefix(prefix, e.path)): e for e in manifest.shards}
    wanted = [os.path.abspath(shard) for shard in shards] or list(listed)
    unknown = [shard for shard in wanted if shard not in listed]
    if unknown:
        raise InputError(f"{manifest_path(prefix)} does not list {named(unknown)}")
    names = Counter(os.path.basename(shard) for shard in wanted)
    doubled = [name for name, count in names.items() if count > 1]
    if doubled:
        raise InputError(
            f"several shards are called {named(doubled)}: copy them to folders of their own, and "
            "name the shards of each folder"
        )
    folder_url = folder_url.rstrip("/")
    for name in names:
        check_allowed(f"{folder_url}/{name}.bin")
    if verify is None:
        verify = "whole" if delete_local else "size"
    elif verify == "size" and delete_local:
        verify = "blocks"
    compare = partial(_problem, verify=verify)
    copies = [(shard, listed[shard], f"{folder_url}/{Path(shard).name}.bin") for shard in wanted]
    found = results_in_order(compare, copies, _SHARDS_TOGETHER, _SHARDS_TOGETHER, "compare")
    for (shard, _, url), problem in zip(copies, found, strict=True):
        is_deleted = False
        if problem is None:
            write_url(f"{shard}.bin", url)
            if delete_local and os.path.lexists(f"{shard}.bin"):
                problem = _delete(Path(f"{shard}.bin"), url)
                is_deleted = problem is None
        yield NotedCopy(shard, url, problem, is_deleted)


def _delete(local: Path, url: str) -> str | None:
    """Deletes the file unless its copy is the file itself, under another name or behind a mount:
    the copy must be there while the file has another name. Else says why it stays."""
    aside = temporary_name(local)
    local.rename(aside)
    try:
        RemoteFile(url)
    except BaseException as error:
        aside.rename(local)
        if not isinstance(error, InputError):
            raise
        url_path(local).unlink(missing_ok=True)
        return f"it is {local} itself, no copy"
    aside.unlink()
    return None


def _is_noted(shard: str, url: str) -> bool:
    """Whether the copy was compared before, and the local file is gone for that."""
    try:
        return allowed_url(f"{shard}.bin") == url
    except (OSError, InputError, ConfigError):
        return False


def _problem(copy: tuple[str, ShardEntry, str], verify: str) -> str | None:
    """How a copy differs from what the list says, or from the local file."""
    shard, entry, url = copy
    try:
        remote = RemoteFile(url)
    except InputError as error:
        return str(error)
    if remote.size != entry.num_bytes:
        return f"it has {remote.size} bytes, not {entry.num_bytes}"
    try:
        remote.check_ranges()
    except InputError as error:
        return str(error)
    if verify != "size":
        with closing(StoredFile(f"{shard}.idx")) as index:
            if fingerprint_of(index, remote) != entry.fingerprint:
                return "it has another content than the list notes"
    if verify == "whole":
        if not os.path.isfile(f"{shard}.bin"):
            return None if _is_noted(shard, url) else f"{shard}.bin is not there to be compared"
        with closing(StoredFile(f"{shard}.bin")) as local:
            for start in range(0, max(remote.size, local.size), _STRETCH):
                if remote.read(start, _STRETCH) != local.read(start, _STRETCH):
                    return f"it differs from {shard}.bin after byte {start}"
    return None
