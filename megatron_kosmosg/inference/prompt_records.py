"""What is asked for: words and images in order, with settings of their own; one or a JSONL file.

A JSONL record is an object with these fields, all but the prompt optional; images are named
relative to the folder of the file, and lie in it:
  prompt           words, with `<image>` where an image goes; needs as many `images`
  images           list of files
  content          instead of the two: [{"text": ..} or {"image": file}, ...], where words are
                   words, also "<image>"
  id               names the results ID-0.png, ID-1.png, ..; the line's number if absent
  negative_prompt, seed, num_images, steps, guidance, height, width, control_image, start_image,
  strength
Long because each field is checked, and each fault said, here.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_kosmosg.command_line import MAX_SEED
from megatron_kosmosg.data.image_reading import read_image
from megatron_kosmosg.data.image_types import UnreadableImage
from megatron_kosmosg.data.tokenizer import IMAGE as PLACEHOLDER
from megatron_kosmosg.foreign_files import OutsideFolder, inside, parse_json, read_file

PromptPart = str | Path
"""Words, or the file of an image."""

MAX_ID_BYTES = 151
"""In UTF-8. File systems allow names of 255, and some, encrypted, a hundred fewer."""
_INTEGERS = {
    "seed": (0, MAX_SEED),
    "num_images": (1, 10_000),
    "steps": (1, 10_000),
    "height": (1, 16_384),
    "width": (1, 16_384),
}
"""Fields that hold a whole number, the smallest and the largest."""
_PROMPT_FIELDS = ("prompt", "images", "content")


class PromptError(ValueError):
    """A prompt that cannot be used; the message names it and what is needed."""


@dataclass(frozen=True)
class GenerationOptions:
    """How a prompt is drawn; None leaves the choice to the run's defaults."""

    negative_prompt: str | None = None
    seed: int | None = None
    """Seed of the first image; the next ones count up."""
    num_images: int | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    """Pixels."""
    width: int | None = None
    control_image: Path | None = None
    """What a ControlNet sees."""
    start_image: Path | None = None
    """What sampling starts from, under noise, in place of noise alone."""
    strength: float | None = None
    """Above 0 and at most 1: the share of the steps that are made, and with it of the start image
    that is lost."""

    @property
    def images(self) -> list[Path]:
        """The files of images that the options name."""
        return [path for path in (self.control_image, self.start_image) if path is not None]


@dataclass(frozen=True)
class NoiseRow:
    """A row of one draw, made with seed 0 on the device and in the type of the U-Net."""

    row: int
    num_rows: int


@dataclass(frozen=True)
class PromptRecord:
    """One prompt: words and images in order, and how it is to be drawn."""

    id: str | None
    """Names its images; None until its settings are known."""
    content: tuple[PromptPart, ...]
    options: GenerationOptions = field(default_factory=GenerationOptions)
    noise: tuple[NoiseRow, ...] = ()
    """Start noise of each of its images in place of what their seeds give."""
    place: str = ""
    """The option that gave it, for messages where it has no id."""

    @property
    def images(self) -> list[Path]:
        """The files of the prompt's images, in order."""
        return [part for part in self.content if isinstance(part, Path)]

    @property
    def text(self) -> str:
        """The prompt for people: words with `<image>` for every image."""
        return " ".join(PLACEHOLDER if isinstance(p, Path) else p for p in self.content)


OPTION_FIELDS = tuple(option.name for option in fields(GenerationOptions))
RECORD_FIELDS = ("id", *_PROMPT_FIELDS, *OPTION_FIELDS)


def read_records(path: Path, image_root: Path | None = None) -> list[PromptRecord]:
    """The records of a JSONL file. Raises PromptError for the first bad one, naming its line.

    Args:
        image_root: another folder in which images may lie, besides that of the file.
    """
    try:
        # Not splitlines: JSON allows U+2028, which it takes for a line's end, inside strings.
        lines = read_file(path).decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise PromptError(f"no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read: {error}") from error
    records: list[PromptRecord] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            fields = parse_json(line)
        except ValueError as error:
            raise PromptError(f"{place}: not JSON ({error})") from error
        record = parse_record(fields, path.parent, place, f"{number:06d}", image_root)
        # Some file systems take "Cat" and "cat" for the same name; here each record has one.
        folded = unicodedata.normalize("NFC", str(record.id).casefold())
        earlier = seen.setdefault(folded, number)
        if earlier != number:
            raise PromptError(f"{place}: id {record.id!r} is that of line {earlier}, too")
        records.append(record)
    if not records:
        raise PromptError(f"{path} holds no record")
    return records


def parse_record(
    fields: Any, folder: Path, place: str, default_id: str, image_root: Path | None = None
) -> PromptRecord:
    """The record of a JSON object; `place` names it in errors. Its images lie in `folder`, by
    their names relative to it, or in `image_root`."""
    if not isinstance(fields, dict):
        raise PromptError(f"{place}: a record is a JSON object, not {_short(fields)}")
    for name in fields:
        if name not in RECORD_FIELDS:
            near = difflib.get_close_matches(name, RECORD_FIELDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(RECORD_FIELDS)}"
            raise PromptError(f"{place}: unknown field {name!r}; {hint}")
    given = fields.get("id", default_id)
    name = file_id(given)
    if name is None:
        raise PromptError(
            f"{place}: id {_short(given)} cannot name a file; use letters and digits, after the "
            f"first also '.', '_' and '-', of at most {MAX_ID_BYTES} bytes in UTF-8"
        )
    if ("prompt" in fields) == ("content" in fields):
        raise PromptError(f"{place}: give either prompt (with images) or content")
    if "content" in fields:
        if "images" in fields:
            raise PromptError(f"{place}: content holds its images itself; leave out images")
        content = interleaved_content(fields["content"], folder, place)
    else:
        content = _placeholder_content(fields["prompt"], fields.get("images", []), folder, place)
    record = PromptRecord(name, content, _options(fields, folder, place))
    for image in (*record.images, *record.options.images):
        if image is not None:
            _check_location(image, folder, place, image_root)
    return record


def file_id(given: Any) -> str | None:
    """The id as it names files, in composed letters (NFC); None if it cannot.

    Letters and digits are those of any script, with their marks, as in names of Python. Some file
    systems keep letters composed and others apart: one form here, so that two ids are two files.
    """
    if not isinstance(given, str) or not given[:1].isalnum():
        return None
    name = unicodedata.normalize("NFC", given)
    is_safe = ("_" + name.replace(".", "_").replace("-", "_")).isidentifier()
    return name if is_safe and len(name.encode()) <= MAX_ID_BYTES else None


def _check_location(image: Path, folder: Path, place: str, image_root: Path | None) -> None:
    named = image.relative_to(folder) if image.is_relative_to(folder) else image
    try:
        inside(folder, str(named), image_root)
    except OutsideFolder:
        raise PromptError(
            f"{place}: {image} lies outside the folder of the file; --image-root "
            f"{image.resolve().parent} allows that one, too"
        ) from None


def interleaved_content(entries: Any, folder: Path, place: str) -> tuple[PromptPart, ...]:
    """The parts of `[{"text": ..} or {"image": file}, ...]`."""
    if not isinstance(entries, list) or not entries:
        raise PromptError(f"{place}: content is a list of text and image entries")
    content: list[PromptPart] = []
    for entry in entries:
        if not isinstance(entry, dict) or list(entry) not in (["text"], ["image"]):
            raise PromptError(
                f'{place}: a content entry is {{"text": ..}} or {{"image": file}}, '
                f"not {_short(entry)}"
            )
        ((kind, value),) = entry.items()
        if not isinstance(value, str):
            raise PromptError(f"{place}: {kind} is a string, not {_short(value)}")
        content.append(value if kind == "text" else folder / value)
    return tuple(content)


def _placeholder_content(
    prompt: Any, images: Any, folder: Path, place: str
) -> tuple[PromptPart, ...]:
    if not isinstance(prompt, str):
        raise PromptError(f"{place}: prompt is a string, not {_short(prompt)}")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise PromptError(f"{place}: images is a list of file names, not {_short(images)}")
    return split_prompt(prompt, [folder / image for image in images], place)


def split_prompt(prompt: str, images: Sequence[Path], place: str) -> tuple[PromptPart, ...]:
    """The parts of `prompt`, an image in the place of every `<image>`."""
    fragments = prompt.split(PLACEHOLDER)
    if len(fragments) - 1 != len(images):
        raise PromptError(
            f"{place}: {len(fragments) - 1} {PLACEHOLDER} in the prompt but {len(images)} "
            f"image(s) given; write {PLACEHOLDER} once where each image goes"
        )
    content: list[PromptPart] = []
    for i, fragment in enumerate(fragments):
        if i:
            content.append(images[i - 1])
        if fragment.strip():
            content.append(fragment.strip())
    return tuple(content)


def _options(fields: Mapping[str, Any], folder: Path, place: str) -> GenerationOptions:
    values = {name: fields[name] for name in OPTION_FIELDS if fields.get(name) is not None}
    for name, (smallest, largest) in _INTEGERS.items():
        value = values.get(name, smallest)
        if type(value) is not int or not smallest <= value <= largest:
            raise PromptError(
                f"{place}: {name} is a whole number from {smallest} to {largest}, not "
                f"{_short(value)}"
            )
    guidance = values.get("guidance", 1.0)
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or guidance < 0:
        raise PromptError(f"{place}: guidance is a number from 0 up, not {_short(guidance)}")
    strength = values.get("strength", 1.0)
    is_number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not is_number or not 0 < strength <= 1:
        raise PromptError(
            f"{place}: strength is a number above 0 and at most 1, not {_short(strength)}"
        )
    for name in ("negative_prompt", "control_image", "start_image"):
        if not isinstance(values.get(name, ""), str):
            raise PromptError(f"{place}: {name} is a string, not {_short(values[name])}")
    for name in ("control_image", "start_image"):
        if name in values:
            values[name] = folder / values[name]
    return GenerationOptions(**values)


def open_image_file(path: Path) -> Image.Image:
    """The RGB image of a file, upright. Raises PromptError if it cannot be decoded."""
    try:
        return read_image(read_file(path))
    except FileNotFoundError:
        raise PromptError(f"no image {path}") from None
    except (OSError, UnreadableImage) as error:
        raise PromptError(f"{path} cannot be decoded as an image: {error}") from error


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
