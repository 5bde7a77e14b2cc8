"""Checked access to the fields of a record; everything wrong is a reason to reject it."""

from __future__ import annotations

import json
from typing import Any

from megatron_kosmosg.preprocess.records import Rejected


def text_field(fields: dict[str, Any], name: str) -> str:
    """A text that can be encoded, with something other than blanks in it."""
    if name not in fields:
        raise Rejected(f"no field {name}")
    value = fields[name]
    if not isinstance(value, str):
        if value is None:
            raise Rejected(f"{name} is null")
        raise Rejected(f"{name} is not text", repr(value)[:80])
    if not value.strip():
        raise Rejected(f"empty {name}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            # JSON can spell a lone surrogate; SentencePiece would fail on it.
            raise Rejected(f"{name} is not Unicode", str(error)) from error
    return value


def list_field(fields: dict[str, Any], name: str) -> list[Any]:
    """A list, possibly empty."""
    if name not in fields:
        raise Rejected(f"no field {name}")
    if not isinstance(fields[name], list):
        raise Rejected(f"{name} is null" if fields[name] is None else f"{name} is not a list")
    return fields[name]


def extra_fields(fields: dict[str, Any], used: tuple[str, ...]) -> dict[str, Any]:
    """The fields that no converter asked for; they are kept in the sample's JSON part.

    What JSON does not know (dates and decimals of Parquet) becomes text; bytes are left out.
    """
    return {
        name: json.loads(json.dumps(value, default=str))
        for name, value in fields.items()
        if name not in used and not _holds_bytes(value)
    }


def _holds_bytes(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_bytes, value.values()))
    if isinstance(value, list):
        return any(map(_holds_bytes, value))
    return isinstance(value, bytes)
