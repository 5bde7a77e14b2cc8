"""What passes from a reader to a converter: records, and reasons to leave one out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Rejected(Exception):
    """This record is left out; the message is the reason, without values, so it can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Record:
    """One record of any input format; pictures are file names or encoded bytes."""

    source: str
    """Where it stands, such as `captions.jsonl:12`; the key of records that have none."""
    fields: dict[str, Any]
    folder: Path
    """Folder that relative file names refer to."""

    @property
    def key(self) -> str:
        """The record's own key, or its source."""
        return str(self.fields.get("key", self.source))


@dataclass(frozen=True)
class BadRecord:
    """A record that could not even be parsed."""

    source: str
    rejected: Rejected


@dataclass(frozen=True)
class Shard:
    """A stretch of one input file, the unit of work. Depends on the input alone."""

    path: Path
    offset: int
    """Bytes from the start of the file."""
    first_record: int
    num_records: int


class Reader(Protocol):
    """Reads one input format."""

    def shards(self, path: Path, limit: int | None) -> list[Shard]:
        """The file cut into shards; at most `limit` records in all."""

    def read(self, shard: Shard) -> Iterator[Record | BadRecord]:
        """The records of a shard in order."""
