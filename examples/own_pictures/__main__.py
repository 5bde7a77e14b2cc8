"""`python -m own_pictures`: what the images of a folder show, told by their names. Started by
own_pictures.sh, before the first command that reads the images.

An image shows the folder that it lies in (`my dog/3.jpg`), else what it is called itself
(`red_teapot_2.jpg`). A text of the same name beside it (`3.txt`) says more. Exit codes: 0 done;
2 wrong arguments, or images that nothing names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import CommandParser, existing_folder, file_path, report_error
from megatron_kosmosg.construction.sources import ENDINGS, plain_key
from megatron_kosmosg.files import real_folder, write_text

CAMERA_NAMES = {"dsc", "dscf", "dscn", "image", "img", "mvimg", "photo", "pict", "picture", "pxl"}
"""What cameras call their files, which says nothing of what is in them."""
SCENES = ("on a beach", "in the snow", "in front of a city at night")


@dataclass(frozen=True)
class Described:
    """One image."""

    path: str
    """Below the folder of images."""
    subject: str
    caption: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes annotations.jsonl (for build-data), captions.jsonl and prompts.jsonl."""
    parser = CommandParser(prog="own_pictures")
    parser.add_argument("--pictures", type=existing_folder, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=file_path, required=True, metavar="FOLDER")
    args = parser.parse_args(arguments)
    try:
        found = describe(args.pictures)
    except ValueError as error:
        return report_error(str(error))
    output = real_folder(args.output)
    _write(output / "annotations.jsonl", [_annotation(each) for each in found])
    _write(
        output / "captions.jsonl",
        [{"key": plain_key(e.path), "image": e.path, "caption": e.caption} for e in found],
    )
    firsts = {each.subject: each for each in reversed(found)}
    prompts = _prompts(args.pictures.resolve(), list(firsts.values())[::-1])
    _write(output / "prompts.jsonl", prompts)
    print(f"{len(found)} pictures of {len(firsts)} subjects: {', '.join(sorted(firsts))}")
    return exit_codes.DONE


def describe(folder: Path) -> list[Described]:
    """Every image below `folder`, in the order of the names.

    Raises ValueError where there is none, or where nothing says what one shows.
    """
    paths = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix[1:].lower() in ENDINGS and path.is_file()
    )
    if not paths:
        raise ValueError(f"--pictures {folder}: no pictures below it ({', '.join(ENDINGS)})")
    nameless = [str(path) for path in paths if not subject_of(path)]
    if nameless:
        raise ValueError(
            f"--pictures {folder}: nothing says what {len(nameless)} pictures show, such as "
            f"{', '.join(nameless[:3])}; put the pictures of a subject into a folder of its name "
            "('my dog/'), or call them by it ('my_dog_1.jpg')"
        )
    return [_described(folder, path) for path in paths]


def subject_of(path: Path) -> str:
    """The subject that an image's folder names, else its own name; "" where neither does."""
    name = path.parent.name if len(path.parts) > 1 else path.stem
    words = re.sub(r"[\W_\d]+", " ", name).split()
    if all(word.lower() in CAMERA_NAMES for word in words):
        return ""
    return " ".join(words)


def _described(folder: Path, path: Path) -> Described:
    subject = subject_of(path)
    beside = (folder / path).with_suffix(".txt")
    if not beside.is_file():
        return Described(path.as_posix(), subject, f"a photo of {subject}")
    text = " ".join(beside.read_text(encoding="utf-8").split())
    is_named = re.search(rf"\b{re.escape(subject)}\b", text)
    return Described(path.as_posix(), subject, text if is_named else f"{subject}, {text}")


def _annotation(image: Described) -> dict:
    """As `kosmosg build-data` takes it. No mask: the entity's image is the whole square."""
    start = image.caption.index(image.subject)
    span = [start, start + len(image.subject)]
    entity = {"text": image.subject, "span": span, "mask": None}
    return {
        "key": plain_key(image.path),
        "caption": image.caption,
        "entities": [entity],
    }


def _prompts(folder: Path, firsts: Sequence[Described]) -> list[dict]:
    """As `kosmosg generate --prompts` takes them: every subject in every scene."""
    return [
        {
            "id": f"{image.subject.replace(' ', '_')}-{number}",
            "prompt": f"<image> {scene}",
            "images": [str(folder / image.path)],
        }
        for image in firsts
        for number, scene in enumerate(SCENES)
    ]


def _write(path: Path, records: Sequence[dict]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


if __name__ == "__main__":
    sys.exit(main())
