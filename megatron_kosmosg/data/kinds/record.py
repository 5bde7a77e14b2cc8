"""A record as a reader of files gives it, and checked access to its fields.

Everything that is wrong with a record is a reason to leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


class Rejected(Exception):
    """This record is left out; the message is the reason, without values, so it can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Record:
    """One record of any input format; images are file names or encoded bytes."""

    source: str
    """Where it stands, such as `captions.jsonl:12`; the key of records that have none."""
    fields: dict[str, Any]
    folder: Path
    """Folder that relative file names refer to."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Contents that came with the record, by the name a field may call them (a tar's members)."""
    left_out: tuple[str, ...] = ()
    """What its layout had and it has not, as Converted.left_out."""
    note: str | None = None
    """What its reader did to it that its user should know; it is counted."""

    @property
    def key(self) -> str:
        """The key that the record brings, or else the place that it comes from."""
        return str(self.fields["key"]) if self.has_own_key else self.source

    @property
    def has_own_key(self) -> bool:
        """Whether the input gives the record a key."""
        return self.fields.get("key") is not None

    def with_fields(self, fields: dict[str, Any]) -> Record:
        """The same record with other fields; it keeps its key."""
        key_field = {"key": self.fields["key"]} if self.has_own_key else {}
        return replace(self, fields=key_field | fields)


def is_filled(value: object) -> bool:
    """Whether a field says anything: not null, blanks, or Parquet's image without both parts."""
    if isinstance(value, dict):
        return value.keys() != {"bytes", "path"} or any(map(is_filled, value.values()))
    return value is not None and not (isinstance(value, str) and not value.strip())


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
    """The field's list, which may be empty. Raises Rejected for anything else."""
    if name not in fields:
        raise Rejected(f"no field {name}")
    if not isinstance(fields[name], list):
        raise Rejected(f"{name} is null" if fields[name] is None else f"{name} is not a list")
    return fields[name]


def extra_fields(fields: dict[str, Any], used: tuple[str, ...]) -> dict[str, Any]:
    """The fields that no kind asked for; they are kept in the sample's JSON part.

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
