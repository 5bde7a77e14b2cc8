"""Checkpoints as folders: `iter_0000100/` exists under that name only when it is whole.

A save fills `iter_0000100.tmp/`; `finish` writes `complete.json` (the size of every file and the
digest of the small ones), flushes everything to disk and renames. A crash at any moment leaves
either the old state or the new one. A file of tensors has a checksum beside it, which is compared
when it is to be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from megatron_kosmosg.checkpoint.base_record import CHECKSUM, TENSORS, read_base
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.import_advice import how_to_import
from megatron_kosmosg.config.paths import COMPLETE_FILE
from megatron_kosmosg.files import begin_folder, finish_folder, remove, remove_folder
from megatron_kosmosg.foreign_files import inside, read_json

CONFIG_FILE = "config.yaml"
DAMAGED = ".damaged"
"""Ends the name of a checkpoint that was found unreadable."""
_CHUNK = 1 << 24


def folder_name(iteration: int) -> str:
    """The name of an iteration's folder: `iter_0000100` for iteration 100."""
    return f"iter_{iteration:07d}"


def begin(save: Path, iteration: int) -> Path:
    """An empty folder to fill; left-overs of interrupted saves are removed."""
    for stale in save.glob("iter_*.tmp"):
        remove(stale)
    return begin_folder(save / folder_name(iteration), only_writer=True)


def finish(temporary: Path, config_yaml: str) -> Path:
    """Completes the folder and gives it its final name, which is returned."""
    (temporary / CONFIG_FILE).write_text(config_yaml)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
    for path in files:
        _flush(path)
    listing = temporary / COMPLETE_FILE
    digests = {name: _digest(temporary / name) for name in sizes if not name.endswith(TENSORS)}
    listing.write_text(json.dumps({"files": sizes, "digests": digests}, indent=1) + "\n")
    _flush(listing)
    _flush(temporary)
    final = temporary.with_suffix("")
    # There may be an earlier save of the same iteration, found invalid or being repeated.
    finish_folder(temporary, final, only_writer=True, replaces=True)
    _flush(final.parent)
    return final


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, None if they are those that `complete.json`
    lists. Checkpoints of before there were digests are whole by their sizes."""
    try:
        listing = read_json(folder / COMPLETE_FILE)
        sizes, digests = dict(listing["files"]), dict(listing.get("digests", {}))
        paths = _paths(folder, sizes)
        missing = [name for name, path in paths.items() if not path.is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{COMPLETE_FILE} is missing or damaged"
    if missing:
        return f"{missing[0]} is missing"
    for name, size in sizes.items():
        path = paths[name]
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if name in digests and _digest(path) != digests[name]:
            return f"{name} has other content than was written"
    return None


def listed_files(folder: Path) -> dict[str, Path]:
    """The files of a whole checkpoint, by their names in it; `complete.json` comes last."""
    names = read_json(folder / COMPLETE_FILE)["files"]
    return _paths(folder, names) | {COMPLETE_FILE: folder / COMPLETE_FILE}


def _paths(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    return {name: inside(folder, name) for name in names}


def is_valid(folder: Path) -> bool:
    """Whether the checkpoint is whole, as far as can be told without reading its tensors."""
    return damage(folder) is None


def damages(save: Path, newer_than: Path | None = None) -> list[str]:
    """One line for each damaged checkpoint in `save`, newest first."""
    found = []
    for folder in reversed(_iteration_folders(save)):
        if newer_than is not None and _iteration(folder) <= _iteration(newer_than):
            break
        problem = damage(folder)
        if problem is not None:
            found.append(f"{folder} is damaged: {problem}")
    return found


def latest_valid(save: Path, older_than: Path | None = None) -> Path | None:
    """The newest whole checkpoint in `save`, or None."""
    for folder in reversed(_iteration_folders(save)):
        if older_than is not None and _iteration(folder) >= _iteration(older_than):
            continue
        if is_valid(folder):
            return folder
    return None


def set_aside(folder: Path) -> None:
    """Gives a checkpoint a name under which nothing takes it for one."""
    aside = folder.with_name(folder.name + DAMAGED)
    with suppress(OSError):
        remove(aside)
    folder.rename(aside)


def find_checkpoint(path: Path, option: str = "checkpoint.load=") -> Path:
    """The checkpoint meant by a run folder, a checkpoint folder or an `iter_` folder.

    Args:
        option: what the user gave the path to, for messages, as "--run ".

    Raises ConfigError if there is no whole checkpoint.
    """
    if (path / COMPLETE_FILE).is_file():
        problem = damage(path)
        if problem is None:
            return path
        raise ConfigError(f"{option}{path} is damaged: {problem}; give another checkpoint")
    for save in (path, path / "checkpoints"):
        found = latest_valid(save)
        if found is not None:
            return found
    advice = how_to_import(path)
    raise ConfigError(
        f"{option}{path}: no finished checkpoint (iter_*/{COMPLETE_FILE}) there or in "
        f"{path / 'checkpoints'}" + (f"; {advice}" if advice else "")
    )


def write_checksum(path: Path) -> None:
    """Puts the checksum of a file of tensors beside it."""
    path.with_name(path.name + CHECKSUM).write_text(f"{_checksum(path):08x}\n")


def damaged_tensors(folder: Path, share: int, num_shares: int) -> list[str]:
    """One line for each file of tensors whose content is not what was written.

    Reads one share of the files. Those without a checksum, of before there were any, are not read.
    """
    found = []
    for path in sorted(folder.glob(f"*{TENSORS}"))[share::num_shares]:
        noted = path.with_name(path.name + CHECKSUM)
        if noted.is_file() and noted.read_text() != f"{_checksum(path):08x}\n":
            found.append(f"{path.name} has other content than was written")
    return found


def prune(save: Path, keep_last: int, keep_every: int = 0) -> None:
    """Removes all whole checkpoints but the newest `keep_last` (0 keeps all), those of iterations
    that are multiples of `keep_every` (0 for none), and those that one of these has as its base."""
    if keep_last == 0:
        return
    whole = [folder for folder in _iteration_folders(save) if is_valid(folder)]
    multiples = [folder for folder in whole if keep_every and _iteration(folder) % keep_every == 0]
    kept = {folder.resolve() for folder in (*whole[-keep_last:], *multiples)}
    kept.update(*map(_bases, kept))
    for folder in whole:
        if folder.resolve() not in kept:
            remove_folder(folder, only_writer=True)


def _bases(folder: Path) -> list[Path]:
    """The base of a checkpoint, that one's base, and so on, as far as they lie beside it."""
    base = read_base(folder)
    if base is None or Path(base.path).parent != folder.parent:
        return []
    return [Path(base.path), *_bases(Path(base.path))]


def _iteration_folders(save: Path) -> list[Path]:
    """Folders under their final names, oldest first."""
    return sorted((path for path in save.glob("iter_*") if path.name[5:].isdigit()), key=_iteration)


def _iteration(folder: Path) -> int:
    return int(folder.name[5:])


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
