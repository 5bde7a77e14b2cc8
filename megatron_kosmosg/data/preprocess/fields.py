"""Checked access to the fields of a record; everything wrong is a reason to reject it."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from megatron_kosmosg.data.preprocess.records import Record, Rejected


def text_field(fields: dict[str, Any], name: str) -> str:
    """A text with something other than blanks in it."""
    if name not in fields:
        raise Rejected(f"no field {name}")
    value = fields[name]
    if not isinstance(value, str):
        raise Rejected(f"{name} is not text", repr(value)[:80])
    if not value.strip():
        raise Rejected(f"empty {name}")
    return value


def list_field(fields: dict[str, Any], name: str) -> list[Any]:
    """A list, possibly empty."""
    if name not in fields:
        raise Rejected(f"no field {name}")
    if not isinstance(fields[name], list):
        raise Rejected(f"{name} is not a list")
    return fields[name]


def image_field(record: Record, fields: dict[str, Any], name: str) -> bytes:
    """The encoded picture, byte for byte as it is in the file, after it was decoded once."""
    data = _read(record, fields, name)
    image_size(data, name)
    return data


def mask_field(record: Record, fields: dict[str, Any], name: str, image: bytes) -> bytes | None:
    """The encoded mask of `image`, None where the record says null or nothing."""
    if fields.get(name) is None:
        return None
    mask = _read(record, fields, name)
    if image_size(mask, name) != image_size(image, "image"):
        raise Rejected(f"{name} and its image differ in size")
    return mask


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) of an encoded picture that decodes completely."""
    if not data:
        raise Rejected(f"{name} is an empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Rejected(f"{name} cannot be decoded", str(error)) from error


def extra_fields(fields: dict[str, Any], used: tuple[str, ...]) -> dict[str, Any]:
    """The fields that no converter asked for; they are kept in the sample's JSON part."""
    return {name: value for name, value in fields.items() if name not in used}


def _read(record: Record, fields: dict[str, Any], name: str) -> bytes:
    if name not in fields:
        raise Rejected(f"no field {name}")
    value = fields[name]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise Rejected(f"{name} is not a file name", repr(value)[:80])
    try:
        return (record.folder / value).read_bytes()
    except OSError as error:
        raise Rejected(f"{name} cannot be read", f"{value}: {error.strerror}") from error
