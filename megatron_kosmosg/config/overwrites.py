"""What a command writes never takes the place of what it reads, and never becomes a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.paths import (
    FAILURE_FILE,
    LOST_RANKS_FILE,
    METRICS_FILE,
    heartbeat_file,
    output_folder,
    packing_folder,
    plan_file,
    save_folder,
    trace_file,
)
from megatron_kosmosg.config.schema import RunConfig

FileId = tuple[int, int]
"""Device and inode: one file, whatever it is called. Names cannot tell, because of links and of
file systems that do not distinguish upper and lower case."""
_RUN_FILES = ("config.yaml", METRICS_FILE, FAILURE_FILE, LOST_RANKS_FILE)


def refuse_to_overwrite(outputs: Iterable[Path], inputs: Iterable[Path], option: str) -> None:
    """Raises ConfigError, naming both, when one of `outputs` is one of `inputs` or a folder that
    one of them lies in. To be called before anything is written.

    Args:
        outputs: what is made anew, files and folders, there or not.
        inputs: files and folders; those that are not there are left to their readers.
        option: what to change, as "--output-prefix".
    """
    read: dict[FileId | None, Path] = {}
    places: set[Path] = set()
    for path in inputs:
        for place in (path, *path.resolve().parents):
            if place not in places:
                places.add(place)
                read.setdefault(_file_id(place), path)
    for output in outputs:
        found = _file_id(output)
        if found is not None and found in read:
            raise ConfigError(
                f"{output} would be written over {read[found]}, which is read; give another "
                f"{option}"
            )


def refuse_to_write_into(output: Path, inputs: Iterable[Path], option: str) -> None:
    """Raises ConfigError, naming both, when `output`, a file or folder that need not be there, is
    one of the folders `inputs` or lies in one: it would be read as a part of that.

    Args:
        option: as for `refuse_to_overwrite`.
    """
    read = {_file_id(path): path for path in inputs}
    for place in (output, *output.resolve().parents):
        found = _file_id(place)
        if found is not None and found in read:
            raise ConfigError(
                f"{output} would be written into {read[found]}, which is read; give another "
                f"{option}"
            )


def refuse_to_run_over_inputs(
    config: RunConfig, files: Sequence[Path], folders: Sequence[Path]
) -> None:
    """Raises ConfigError when a run's folder, or that of its checkpoints, is or lies in a folder
    that it reads, and when one of its files is one that it reads.

    Args:
        files, folders: what the run reads beside `checkpoint.load`.
    """
    output, save = output_folder(config), save_folder(config)
    read = list(folders)
    if config.checkpoint.load is not None:
        load = Path(config.checkpoint.load)
        checkpoints = load / "checkpoints"
        read.append(checkpoints if checkpoints.is_dir() else load)
        # A run folder may hold other runs; it may not be this one, nor share its checkpoints.
        if _is_same(output, load):
            read.append(load)
        if load.name.startswith("iter_") and _is_same(save, load.parent):
            read.append(save)
    refuse_to_write_into(output, read, "logging.output_dir")
    refuse_to_write_into(save, read, "checkpoint.save")
    written = [output / name for name in _RUN_FILES]
    written += [heartbeat_file(config), trace_file(config), packing_folder(config)]
    written.append(plan_file(config))
    refuse_to_overwrite(written, files, "logging.output_dir")


def _is_same(one: Path, other: Path) -> bool:
    found = _file_id(one)
    return found is not None and found == _file_id(other)


def _file_id(path: Path) -> FileId | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
