"""Checkpoints as folders: `iter_0000100/` exists under that name only when it is whole.

A save fills `iter_0000100.tmp/`; `finish` writes `complete.json` (the size of every file), flushes
everything to disk and renames. A crash at any moment leaves either the old state or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from megatron_kosmosg.config.errors import ConfigError

COMPLETE_FILE = "complete.json"
CONFIG_FILE = "config.yaml"


def folder_name(iteration: int) -> str:
    """`iter_0000100` for iteration 100."""
    return f"iter_{iteration:07d}"


def begin(save: Path, iteration: int) -> Path:
    """An empty folder to fill; left-overs of interrupted saves are removed."""
    save.mkdir(parents=True, exist_ok=True)
    for stale in save.glob("iter_*.tmp"):
        shutil.rmtree(stale)
    temporary = save / f"{folder_name(iteration)}.tmp"
    temporary.mkdir()
    return temporary


def finish(temporary: Path, config_yaml: str) -> Path:
    """Completes the folder and gives it its final name, which is returned."""
    (temporary / CONFIG_FILE).write_text(config_yaml)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
    for path in files:
        _flush(path)
    listing = temporary / COMPLETE_FILE
    listing.write_text(json.dumps({"files": sizes}, indent=1) + "\n")
    _flush(listing)
    _flush(temporary)
    final = temporary.with_suffix("")
    if final.exists():  # an earlier save of the same iteration, found invalid or being repeated
        _remove(final)
    temporary.rename(final)
    _flush(final.parent)
    return final


def is_valid(folder: Path) -> bool:
    """True if every file that `complete.json` lists is there with its size."""
    try:
        sizes = json.loads((folder / COMPLETE_FILE).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def latest_valid(save: Path) -> Path | None:
    """The newest whole checkpoint in `save`, or None."""
    for folder in reversed(_iteration_folders(save)):
        if is_valid(folder):
            return folder
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by a run folder, a checkpoint folder or an `iter_` folder.

    Raises ConfigError if there is no whole checkpoint.
    """
    if (path / COMPLETE_FILE).is_file():
        if is_valid(path):
            return path
        raise ConfigError(
            f"checkpoint {path} is damaged: a file listed in {COMPLETE_FILE} is missing or has "
            "another size; set checkpoint.load to another checkpoint"
        )
    for save in (path, path / "checkpoints"):
        found = latest_valid(save)
        if found is not None:
            return found
    raise ConfigError(
        f"checkpoint.load={path}: no finished checkpoint (iter_*/{COMPLETE_FILE}) there or in "
        f"{path / 'checkpoints'}"
    )


def prune(save: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last` whole checkpoints (0 keeps all)."""
    if keep_last == 0:
        return
    whole = [folder for folder in _iteration_folders(save) if is_valid(folder)]
    for folder in whole[:-keep_last]:
        _remove(folder)


def _iteration_folders(save: Path) -> list[Path]:
    """Folders under their final names, oldest first."""
    named = {int(path.name[5:]): path for path in save.glob("iter_*") if path.name[5:].isdigit()}
    return [named[iteration] for iteration in sorted(named)]


def _remove(folder: Path) -> None:
    """Deletes; under a temporary name first, so that half a checkpoint never has a final name."""
    doomed = folder.with_name(f"{folder.name}.old.tmp")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
