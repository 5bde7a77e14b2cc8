"""Where the weights of a checkpoint lie: in its own folder, and in its base's.

A base is looked for where it was, then in a folder or link named `base` beside the checkpoint, then
in `checkpoint.load`; it counts by its content, and a run's folder by any checkpoint in it. A run
holds its base there under the base's fingerprint, by hard links: they take no space, and the files
outlive that the base's own run deletes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatron_kosmosg.checkpoint.base_record import Base, checkpoint_fingerprint, read_base
from megatron_kosmosg.checkpoint.description import read_description
from megatron_kosmosg.checkpoint.folder import damage, listed_files
from megatron_kosmosg.checkpoint.weight_average import AVERAGE
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.paths import COMPLETE_FILE
from megatron_kosmosg.files import new_folder
from megatron_kosmosg.foreign_files import inside

NOT_MODEL = ("optimizer.", "rng/", f"{AVERAGE}.")
"""Prefixes of checkpoint keys that are not weights of the model."""
_BESIDE = "base"
"""Name of a folder, or of a link to one, beside the checkpoints whose base was moved."""


def weight_folders(folder: Path, load: str | None = None) -> dict[str, Path]:
    """The folder that holds each weight of the checkpoint in `folder`, by its key.

    Args:
        load: the run's `checkpoint.load`, where the base is looked for, too.

    Raises:
        ConfigError: a base is not there any more, or has other content; the message says what to
            do.
    """
    found = {
        key: folder
        for key in read_description(folder).state_dict_metadata
        if not key.startswith(NOT_MODEL) and "_extra_state" not in key
    }
    base = read_base(folder)
    if base is None:
        return found
    of_base = weight_folders(find_base(folder, base, load), load)
    absent = base.weights.keys() - of_base.keys()
    if absent:
        raise ConfigError(f"{folder}: its base {base.path} has no {min(absent)}")
    return found | {key: of_base[key] for key in base.weights}


def find_base(folder: Path, base: Base, load: str | None = None) -> Path:
    """Where the base of the checkpoint in `folder` lies now; arguments and errors are those of
    `weight_folders`."""
    beside = folder.resolve().parent / _BESIDE
    if not os.path.lexists(beside):  # the checkpoint itself was moved, and a link to it left
        beside = folder.parent.resolve() / _BESIDE
    there = "is not there"
    for number, place in enumerate(_places(base, beside, load)):
        if not (place / COMPLETE_FILE).is_file():
            continue
        problem = damage(place)
        mark = None if problem else checkpoint_fingerprint(place)
        if mark == base.fingerprint:
            return place
        if number == 0:
            there = f"is damaged ({problem})" if problem else f"is another one now ({mark})"
    raise ConfigError(
        f"{folder} holds the weights that training changed, and not the frozen ones: those are of "
        f"checkpoint {base.path} (fingerprint {base.fingerprint}), which {there}. Put that one "
        f"back, or link it as {beside}; a run that is continued also takes it from where "
        "checkpoint.load says"
    )


def base_is_there(save: Path, base: Base) -> bool:
    """Whether the base is where it was, or held in the folder of the checkpoints that need it."""
    places = (Path(base.path), save / _BESIDE / base.fingerprint)
    return any(_is_base(place, base) for place in places)


def _is_base(place: Path, base: Base) -> bool:
    return damage(place) is None and checkpoint_fingerprint(place) == base.fingerprint


def hold_base(save: Path, base: Base) -> None:
    """Links the files of a base, and of that one's own base, into the folder of the checkpoints
    that need it.

    A base that lies there itself is left alone, and so is what the user has put in its place.

    Raises:
        OSError: no hard link can lead from `save` to the base: it lies on another file system, on
            one that has none, or belongs to somebody else. Nothing is left behind then.
        ConfigError: the base's own base is gone.
    """
    path, beside = Path(base.path), save / _BESIDE
    if path.parent == save.resolve() or beside.is_symlink() or (beside / COMPLETE_FILE).exists():
        return
    held = beside / base.fingerprint
    if not held.exists():
        problem = damage(path)
        if problem is not None:
            raise ConfigError(f"{path} is damaged: {problem}")
        try:
            with new_folder(held, only_writer=True) as folder:
                for name, file in listed_files(path).items():
                    link = inside(folder, name)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    os.link(os.path.realpath(file), link)
                if not _is_base(folder, base):  # written anew since the run has read it
                    raise ConfigError(f"{path} is another one now, or damaged")
        except (OSError, ConfigError):
            with suppress(OSError):
                beside.rmdir()  # unless there is something in it
            raise
    before = read_base(path)
    if before is not None:
        before = replace(before, path=str(find_base(path, before)))
        hold_base(beside, before)


def _places(base: Base, beside: Path, load: str | None) -> Iterator[Path]:
    yield Path(base.path)
    for place in (beside, *([Path(load)] if load else [])):
        yield place
        yield place / base.fingerprint
        yield from sorted(place.glob("iter_*"), reverse=True)
        yield from sorted(place.glob("checkpoints/iter_*"), reverse=True)
