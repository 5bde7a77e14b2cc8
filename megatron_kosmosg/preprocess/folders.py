"""What a folder that is given as an input holds, and walking it without losing what is linked.

A folder is a dataset of Hugging Face `datasets` (save_to_disk), InstructPix2Pix as it is published,
or samples as img2dataset's `files` output lays them out.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_kosmosg.data.kinds.kind import SampleKind
from megatron_kosmosg.foreign_files import inside, read_json

PROMPTS, SAMPLES = "folder", "files"
"""Formats of folders: InstructPix2Pix's, and files that share their names up to the dot."""
SEEDS_FILE, PROMPT_FILE = "seeds.json", "prompt.json"
"""InstructPix2Pix's list of its folders, and what each holds."""
SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"


def folder_format(folder: Path, kind: SampleKind) -> str:
    """Raises ValueError for a folder whose files are inputs of their own."""
    if PROMPTS in kind.formats and (folder / SEEDS_FILE).is_file():
        return PROMPTS
    # img2dataset leaves a table of each shard beside its folder, and captions are text files.
    beside = ("parquet", "txt") if SAMPLES in kind.formats else ()
    for ending in kind.formats:
        if ending not in beside and any(folder.glob(f"*.{ending}")):
            raise ValueError(
                f"--input {folder} is a folder; give its files: --input '{folder}/*.{ending}'"
            )
    return PROMPTS if PROMPTS in kind.formats else SAMPLES


def arrow_files(folder: Path) -> list[Path] | None:
    """The files of a dataset that Hugging Face `datasets` saved, in its order; None for another
    folder.

    Raises ValueError for several splits and for rows that were chosen or shuffled.
    """
    splits = folder / SPLITS_FILE
    if splits.is_file():
        names = _json(splits).get("splits", [])
        names = names if isinstance(names, list) else []
        options = " or ".join(f"--input {folder / str(name)}" for name in names)
        raise ValueError(f"--input {folder} holds the splits of a dataset; give {options}")
    state = folder / STATE_FILE
    if not state.is_file():
        return None
    stored = _json(state)
    if stored.get("_indices_data_files"):
        raise ValueError(
            f"--input {folder} was saved with rows chosen or shuffled apart from the files; write "
            "it once more: datasets.load_from_disk(FOLDER).flatten_indices().save_to_disk(OTHER)"
        )
    try:
        names = [str(entry["filename"]) for entry in stored.get("_data_files", [])]
    except (TypeError, KeyError) as error:
        raise ValueError(f"--input {folder}: {STATE_FILE} is no list of files: {error}") from error
    if not names:
        raise ValueError(f"--input {folder}: {STATE_FILE} names no files")
    return [inside(folder, name) for name in names]


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walks folders like os.walk, in the order of names, through links, into every folder once."""
    top = os.stat(root)
    seen = {(top.st_dev, top.st_ino)}
    for place, folders, names in os.walk(root, followlinks=True):
        kept = []
        for name in sorted(folders):
            found = os.stat(os.path.join(place, name))
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                kept.append(name)
        folders[:] = kept
        yield Path(place), folders, sorted(names)


def expand_glob(pattern: str) -> Iterator[str]:
    """The paths that a glob with `**` matches, but into every folder once: a link to a folder above
    would otherwise give each file some forty names."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    at = parts.index("**")
    while parts[at + 1 : at + 2] == ["**"]:
        del parts[at]
    above, below = "/".join(parts[:at]), "/".join(parts[at + 1 :]) or "*"
    for top in glob.glob(above + "/") if above or at else ["."]:
        for place, folders, _ in walk(Path(top)):
            folders[:] = [name for name in folders if not name.startswith(".")]
            prefix = "" if top == "." and place == Path() else f"{glob.escape(str(place))}/"
            yield from expand_glob(prefix + below)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    return found if isinstance(found, dict) else {}
