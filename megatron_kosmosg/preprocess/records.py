"""What passes from a reader to a converter: records, and reasons to leave one out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_kosmosg.preprocess.options import Options


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
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Contents that came with the record, by the name a field may call them (a tar's members)."""

    @property
    def key(self) -> str:
        """The record's own key, or its source."""
        return str(self.fields["key"]) if self.has_own_key else self.source

    @property
    def has_own_key(self) -> bool:
        """Whether the input names the record."""
        return self.fields.get("key") is not None

    def with_fields(self, fields: dict[str, Any]) -> Record:
        """The same record with other fields; it keeps its key."""
        own = {"key": self.fields["key"]} if self.has_own_key else {}
        return replace(self, fields=own | fields)


@dataclass(frozen=True)
class BadRecord:
    """A record that could not even be parsed."""

    source: str
    rejected: Rejected


Folder = tuple[str, tuple[str, ...] | None]
"""A folder below the input, and its seeds if they are listed (prompt_folders.py)."""


@dataclass(frozen=True)
class Shard:
    """A stretch of one input, the unit of work. Depends on the input alone."""

    path: Path
    offset: int
    """Where it starts: bytes, or the number of a row group."""
    first_record: int
    num_records: int | None
    """None: all up to the end of the input."""
    folders: tuple[Folder, ...] = ()
    """What an input that is a folder holds."""


@dataclass(frozen=True)
class ShardSize:
    """Where a shard ends: at whichever comes first."""

    records: int
    text_bytes: int
    """For inputs that hold text."""
    image_bytes: int
    """For inputs that hold pictures."""


class Reader(Protocol):
    """Reads one input format. Methods raise OSError only for inputs that cannot be opened."""

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """The input cut into shards; with a limit, at most that many records in all, counted."""

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """The records of a shard in order."""
