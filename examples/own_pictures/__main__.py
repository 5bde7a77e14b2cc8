"""`python -m own_pictures`: what the images of a folder show, told by their names. Started by
own_pictures.sh, before the first command that reads the images.

An image shows the folder that it lies in (`my dog/3.jpg`), else what it is called itself
(`red_teapot_2.jpg`). A text of the same name beside it (`3.txt`) says more. Exit codes: 0 done;
2 wrong arguments, images that nothing names, or a text that is not UTF-8; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    existing_folder,
    file_path,
    first_line,
    note,
    run_command,
)
from megatron_kosmosg.construction.sources import ENDINGS, image_names, plain_key
from megatron_kosmosg.data.scripts import find_words
from megatron_kosmosg.files import real_folder, write_text
from megatron_kosmosg.inference.prompt_records import PromptError, file_id, open_image_file
from own_pictures.subjects import JOINERS, subject_of

SCENES = ("on a beach", "in the snow", "in front of a city at night")


@dataclass(frozen=True)
class Described:
    """One image."""

    path: str
    """Below the folder of images."""
    subject: str
    caption: str
    span: tuple[int, int]
    """Where the caption names the subject, in its own capitals."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes annotations.jsonl (for build-data), captions.jsonl and prompts.jsonl."""
    parser = CommandParser(prog="own_pictures", description=first_line(__doc__))
    parser.add_argument(
        "--pictures",
        type=existing_folder,
        required=True,
        metavar="FOLDER",
        help="images, a folder for each subject (my dog/1.jpg) or named by it (my_dog_1.jpg)",
    )
    parser.add_argument(
        "--output",
        type=file_path,
        required=True,
        metavar="FOLDER",
        help="for annotations.jsonl, captions.jsonl and prompts.jsonl",
    )
    args = parser.parse_args(arguments)
    return run_command(lambda: _write_all(args.pictures, args.output))


def _write_all(folder: Path, output: Path) -> int:
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder")
    found = describe(folder)
    prompts = _prompts(folder.resolve(), readable_firsts(folder, found))
    output = real_folder(output)
    _write(output / "annotations.jsonl", [_annotation(each) for each in found])
    _write(output / "captions.jsonl", _captions(found))
    _write(output / "prompts.jsonl", prompts)
    subjects = sorted({each.subject for each in found})
    print(f"{len(found)} pictures of {len(subjects)} subjects: {', '.join(subjects)}")
    return exit_codes.DONE


def describe(folder: Path) -> list[Described]:
    """Every image that build-data finds below `folder`, in the order of the names.

    Raises ValueError where there is none, where nothing says what one shows, or where a text
    cannot be read.
    """
    paths = sorted(Path(name) for name in image_names(folder))
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


def _described(folder: Path, path: Path) -> Described:
    subject = subject_of(path)
    text = _text((folder / path).with_suffix(".txt"))
    named = find_words(subject, text)
    if named is not None:
        return Described(path.as_posix(), subject, text, named.span())
    before, after = ("", f", {text}") if text else ("a photo of ", "")
    span = (len(before), len(before) + len(subject))
    return Described(path.as_posix(), subject, f"{before}{subject}{after}", span)


def _text(path: Path) -> str:
    """The words of a text, in composed letters as subjects are; "" where there are none."""
    if not path.is_file():
        return ""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from None
    return unicodedata.normalize("NFC", " ".join(text.split()))


def readable_firsts(folder: Path, found: Sequence[Described]) -> list[Described]:
    """The first image of each subject that `kosmosg generate` can read; what cannot be read is
    said. Raises ValueError where no image can.
    """
    firsts: dict[str, Described] = {}
    for each in found:
        if each.subject in firsts:
            continue
        try:
            open_image_file(folder / each.path)
        except PromptError as error:
            note(f"{error}; the prompts do not show it")
        else:
            firsts[each.subject] = each
    if not firsts:
        raise ValueError(f"--pictures {folder}: none of the {len(found)} pictures can be read")
    for subject in sorted({each.subject for each in found} - firsts.keys()):
        note(f"no picture of {subject} can be read; no prompt shows it")
    return list(firsts.values())


def _annotation(image: Described) -> dict:
    """As `kosmosg build-data` takes it. No mask: the entity's image is the whole square."""
    start, end = image.span
    entity = {"text": image.caption[start:end], "span": [start, end], "mask": None}
    return {
        "key": plain_key(image.path),
        "caption": image.caption,
        "entities": [entity],
    }


def _captions(found: Sequence[Described]) -> list[dict]:
    """As `kosmosg preprocess --kind caption` takes them, which wants each key once: `1.png` beside
    `1.jpg` keeps its ending."""
    keys: dict[str, str] = {}
    for each in found:
        keys.setdefault(plain_key(each.path), each.path)
    return [
        {
            "key": key if keys[key] == each.path else each.path,
            "image": each.path,
            "caption": each.caption,
        }
        for each in found
        for key in [plain_key(each.path)]
    ]


def _prompts(folder: Path, firsts: Sequence[Described]) -> list[dict]:
    """As `kosmosg generate --prompts` takes them: every subject in every scene."""
    names = _file_names([image.subject for image in firsts])
    return [
        {
            "id": f"{name}-{number}",
            "prompt": f"<image> {scene}",
            "images": [str(folder / image.path)],
        }
        for image, name in zip(firsts, names, strict=True)
        for number, scene in enumerate(SCENES)
    ]


def _file_names(subjects: Sequence[str]) -> list[str]:
    """A name for the results of each subject, distinct where upper and lower case are the same. No
    subject has a digit, so that those with one are free."""
    names: dict[str, str] = {}
    for number, subject in enumerate(subjects, start=1):
        name = "".join(letter for letter in subject if letter not in JOINERS).replace(" ", "_")
        choices = (name, f"{name}_{number}", f"subject_{number}")
        chosen = next(
            choice
            for choice in choices
            if file_id(f"{choice}-{len(SCENES)}") and choice.casefold() not in names
        )
        names[chosen.casefold()] = chosen
    return list(names.values())


def _write(path: Path, records: Sequence[dict]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


if __name__ == "__main__":
    sys.exit(main())
