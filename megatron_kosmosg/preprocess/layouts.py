"""The layouts that public datasets come in -> records as the converters know them.

caption        img2dataset (tar, Parquet), Hugging Face image folders, the authors' LAION rows
interleaved    MMC4, OBELICS
edit           InstructPix2Pix in Parquet (Hugging Face) and in the authors' rows
compositional  the authors' Open Images rows
A layout is recognised by its fields; records that already have ours pass as they are. docs/data.md
tells them to users.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from megatron_kosmosg.data.kinds.record import (
    Record,
    Rejected,
    is_filled,
    list_field,
    text_field,
)
from megatron_kosmosg.foreign_files import parse_json
from megatron_kosmosg.preprocess.image_check import ImageCheck
from megatron_kosmosg.preprocess.lines import decode_utf8
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.tags import mask_between, tag_entities

RecordLayout = Callable[[Record, ImageCheck], Iterator[Record]]

UNUSED_TAG = "entities: tag is a colour, in no word or in those of two tags"
_CAPTION_NAMES = {
    "caption": ("text", "TEXT"),
    "image": ("file_name", "jpg", "png", "webp", "image_path"),
}
_TEXT_FIELDS = ("key", "text", "caption", "instruction")
_LIST_FIELDS = ("entities", "content", "text_list", "image_info", "texts", "images")
"""Fields for which a file that --field names holds text, and JSON; for others an image."""
_EDIT_NAMES = {
    "caption": ("original_prompt",),
    "image": ("original_image",),
    "instruction": ("edit_prompt",),
    "target": ("edited_image",),
}


def canonical_records(
    kind: str, record: Record, options: Options, image_check: ImageCheck
) -> Iterator[Record]:
    """The records (several for a row with several pairs) that `record` stands for.

    One column may serve several fields, so what `options.fields` names is taken away last. A field
    that says nothing leaves its place to the one that the layout would take. Raises Rejected.
    """
    layout = _LAYOUTS.get(kind, _as_it_is)
    if not options.fields:
        yield from layout(record, image_check)
        return
    named = {field: _named(record, field, input_name) for field, input_name in options.fields}
    fields = record.fields | {field: value for field, value in named.items() if is_filled(value)}
    used = {input_name for _, input_name in options.fields} - named.keys()
    for found in layout(replace(record, fields=fields), image_check):
        rest = {name: value for name, value in found.fields.items() if name not in used}
        yield replace(found, fields=rest)


def _named(record: Record, field: str, input_name: str) -> object:
    """What the input calls `input_name`: a field, or a file that came with the record."""
    if is_filled(record.fields.get(input_name)):
        return record.fields[input_name]
    member = input_name.lower()
    if member not in record.files:
        return None
    if field in _TEXT_FIELDS:
        return decode_utf8(record.files[member])
    if field in _LIST_FIELDS:
        try:
            return parse_json(decode_utf8(record.files[member]))
        except ValueError as error:
            raise Rejected(f"{field} is not JSON", str(error)) from error
    return member


def _as_it_is(record: Record, image_check: ImageCheck) -> Iterator[Record]:
    yield record


def _caption(record: Record, image_check: ImageCheck) -> Iterator[Record]:
    if "columns" not in record.fields:
        yield _renamed(record, _CAPTION_NAMES)
        return
    columns = record.fields["columns"]
    if len(columns) < 5:
        raise _wrong_columns(columns, "at least 5: id, caption, image, width, height")
    if not (columns[3].isdecimal() and columns[4].isdecimal()):
        raise Rejected("width or height is not a number", f"{columns[3]!r} {columns[4]!r}"[:80])
    yield record.with_fields(
        {"id": columns[0], "caption": columns[1], "image": _base64(columns[2])}
    )


def _interleaved(record: Record, image_check: ImageCheck) -> Iterator[Record]:
    fields = record.fields
    if "content" in fields:
        yield record
    elif "text_list" in fields and "image_info" in fields:
        yield record.with_fields({"content": _mmc4_content(fields)} | _kept(fields, "url"))
    elif "texts" in fields and "images" in fields:
        yield record.with_fields({"content": _obelics_content(fields)} | _kept(fields, "url"))
    else:
        raise Rejected("no field content")


def _mmc4_content(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Each image stands before the sentence that MMC4 matched it with."""
    sentences = list_field(fields, "text_list")
    before: list[list[dict[str, Any]]] = [[] for _ in sentences]
    for info in list_field(fields, "image_info"):
        at = info.get("matched_text_index") if isinstance(info, dict) else None
        if type(at) is not int or not 0 <= at < len(sentences):
            raise Rejected("matched_text_index outside the text", repr(at)[:80])
        before[at].append({"image": info.get("image_name")})
    content: list[dict[str, Any]] = []
    for images, sentence in zip(before, sentences, strict=True):
        content.extend(images)
        if not isinstance(sentence, str):
            raise Rejected("text is not text", repr(sentence)[:80])
        if content and "text" in content[-1]:
            content[-1]["text"] += f" {sentence}"
        elif sentence.strip():
            content.append({"text": sentence})
    return content


def _obelics_content(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Two lists of one length; at each place one of them is null."""
    texts, images = list_field(fields, "texts"), list_field(fields, "images")
    if len(texts) != len(images):
        raise Rejected("texts and images differ in length", f"{len(texts)} and {len(images)}")
    content: list[dict[str, Any]] = []
    for text, image in zip(texts, images, strict=True):
        if (text is None) == (image is None):
            raise Rejected("place with both or neither of text and image")
        if image is not None:
            content.append({"image": image})
        elif not isinstance(text, str) or text.strip():
            content.append({"text": text})
    return content


def _edit(record: Record, image_check: ImageCheck) -> Iterator[Record]:
    if "columns" not in record.fields:
        yield _renamed(record, _EDIT_NAMES)
        return
    columns = record.fields["columns"]
    if len(columns) < 4 or len(columns) % 2:
        raise _wrong_columns(columns, "caption, instruction, then pairs of images")
    for pair in range((len(columns) - 2) // 2):
        before, after = columns[2 + 2 * pair : 4 + 2 * pair]
        yield record.with_fields(
            {
                "key": f"{record.source}/{pair}",
                "caption": columns[0],
                "image": _base64(before),
                "instruction": columns[1],
                "target": _base64(after),
            }
        )


def _compositional(record: Record, image_check: ImageCheck) -> Iterator[Record]:
    if "columns" not in record.fields:
        yield record
        return
    columns = record.fields["columns"]
    if len(columns) < 3:
        raise _wrong_columns(columns, "caption, tags, image, then two crops for each tag")
    tags = [tag.strip() for tag in columns[1].split(",")] if columns[1].strip() else []
    if len(columns) != 3 + 2 * len(tags):
        raise _wrong_columns(columns, f"{3 + 2 * len(tags)} for {len(tags)} tags")
    caption = text_field({"caption": columns[0]}, "caption")
    entities = []
    for number, entity in tag_entities(caption, tags):
        crop, on_white = (_base64(columns[3 + 2 * number + i]) for i in (0, 1))
        shown = [image_check.decoded(data, "image") for data in (crop, on_white)]
        mask = mask_between(*shown)
        entities.append(entity | {"image": crop, "mask": mask})
    fields = {"caption": caption, "image": _base64(columns[2]), "entities": entities}
    unused = (UNUSED_TAG,) * (len(tags) - len(entities))
    yield replace(record.with_fields(fields), left_out=unused)


_LAYOUTS: dict[str, RecordLayout] = {
    "caption": _caption,
    "interleaved": _interleaved,
    "edit": _edit,
    "compositional": _compositional,
}
"""By the kind of sample that the published datasets hold."""


def _renamed(record: Record, names: dict[str, tuple[str, ...]]) -> Record:
    """The first name that says anything gives a field its value."""
    fields = dict(record.fields)
    for field, input_names in names.items():
        for input_name in input_names:
            if not is_filled(fields.get(field)) and input_name in fields:
                fields[field] = fields.pop(input_name)
    return record.with_fields(fields)


def _kept(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: fields[name] for name in names if name in fields}


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("image is not base64", str(error)) from error


def _wrong_columns(columns: list[str], needed: str) -> Rejected:
    return Rejected("wrong number of TSV columns", f"{len(columns)}; needed: {needed}")
