"""Any two folders of images, or a JSONL file of pairs, as items to be scored.

A JSONL record is {"generated": file, "reference": file or list of files, "text": words}; one of the
last two may be absent. Files are named relative to the folder of the JSONL file, and lie in it or
in `image_root`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.evaluation.similarity import Item
from megatron_kosmosg.foreign_files import OutsideFolder, files_below, inside, parse_json, read_file

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FIELDS = ("generated", "reference", "text")


def images_in(folder: Path) -> list[Path]:
    """The images below a folder, in the order of their names. Raises InputError where there are
    none."""
    found = [path for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise InputError(
            f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}); give a folder of images"
        )
    return sorted(found)


def items_of_folders(generated: Path, reference: Path) -> list[Item]:
    """Files of the same name, whatever their endings, belong together. Raises InputError that
    names the first file without a partner."""
    generated_files, reference_files = _by_name(generated), _by_name(reference)
    for files, others, folder, other in (
        (generated_files, reference_files, generated, reference),
        (reference_files, generated_files, reference, generated),
    ):
        alone = sorted(files.keys() - others.keys())
        if alone:
            raise InputError(
                f"{files[alone[0]]} has no partner of that name in {other} ({len(alone)} of "
                f"{len(files)} in {folder} have none); give folders with the same names, --pairs, "
                "or --inception alone, which needs no partners"
            )
    return [
        Item(name, generated_files[name], (reference_files[name],))
        for name in sorted(generated_files)
    ]


def _by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in images_in(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise InputError(f"{path} and {found[name]} have one name; give --pairs instead")
        found[name] = path
    return found


def items_of_file(path: Path, image_root: Path | None = None) -> list[Item]:
    """The records of a JSONL file. Raises InputError for the first bad one, naming its line."""
    try:
        lines = read_file(path).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--pairs {path} cannot be read: {error}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path.name}:{number}"
            try:
                record = parse_json(line)
            except ValueError as error:
                raise InputError(f"{place}: not JSON ({error})") from error
            items.append(_item(record, path.parent, image_root, place, f"{number:06d}"))
    if not items:
        raise InputError(f"--pairs {path} holds no record")
    return items


def _item(record: Any, folder: Path, root: Path | None, place: str, name: str) -> Item:
    if (
        not isinstance(record, dict)
        or "generated" not in record
        or not record.keys() <= set(FIELDS)
    ):
        shown = json.dumps(record, ensure_ascii=False)[:60]
        raise InputError(f"{place}: a record has generated and reference or text, not {shown}")
    references = record.get("reference", [])
    references = [references] if isinstance(references, str) else references
    text = record.get("text")
    if not isinstance(references, list) or not (references or text):
        raise InputError(f"{place}: give reference (a file or a list of files), text, or both")
    if text is not None and not isinstance(text, str):
        raise InputError(f"{place}: text is a string, not {json.dumps(text)[:60]}")
    generated, *others = _files([record["generated"], *references], folder, root, place)
    return Item(name, generated, tuple(others), text or None)


def _files(names: Sequence[Any], folder: Path, root: Path | None, place: str) -> list[Path]:
    found = []
    for name in names:
        if not isinstance(name, str) or not name:
            raise InputError(f"{place}: the name of a file, not {json.dumps(name)[:60]}")
        try:
            path = inside(folder, name, root)
        except OutsideFolder as error:
            raise InputError(f"{place}: {error}; --image-root FOLDER allows another") from None
        except ValueError as error:  # no name that a file can have
            raise InputError(f"{place}: {json.dumps(name)[:60]}: {error}") from error
        if not os.path.isfile(path):  # Path's raises for a name that is too long
            raise InputError(f"{place}: no image {str(path)[:200]}")
        found.append(path)
    return found
