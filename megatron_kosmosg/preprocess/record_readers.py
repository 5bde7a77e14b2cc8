"""What every reader of an input format offers: it cuts an input into shards, and reads a shard's
records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.preprocess.options import Options

READING_VERSION = 2
"""Of the rules by which an input becomes shards and records: work of another is not resumed."""


@dataclass(frozen=True)
class BadRecord:
    """A record that could not even be parsed."""

    source: str
    rejected: Rejected


FolderEntry = tuple[str, tuple[str, ...] | None]
"""One record's place below an input that is a folder, and what belongs to it: a prompt folder and
its seeds, None where they are not listed (prompt_folders.py); the name of a sample up to the dot
and the endings of its files (sample_folders.py); an image file and None (construction)."""


@dataclass(frozen=True)
class Shard:
    """A stretch of one input, the unit of work. Depends on the input alone."""

    path: Path
    offset: int
    """Where it starts: bytes, or the number of a row group."""
    first_record: int
    num_records: int | None
    """None: all up to the end of the input."""
    entries: tuple[FolderEntry, ...] = ()
    """The records of an input that is a folder; empty for a file."""
    label: str = ""
    """What records call the input, where the file's name alone does not tell which it is."""

    @property
    def name(self) -> str:
        """The file's name, or more of its path where another input has the same name."""
        return self.label or self.path.name

    def within(self, name: str) -> str:
        """What a record inside a folder is called: by its place there, and the folder's label."""
        return f"{self.label}/{name}" if self.label else name


@dataclass(frozen=True)
class ShardSize:
    """The most that a shard holds: it ends at whichever of these comes first."""

    records: int
    text_bytes: int
    """For inputs that hold text."""
    image_bytes: int
    """For inputs that hold images."""


class Reader(Protocol):
    """Reads one input format. Methods raise OSError only for inputs that cannot be opened."""

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """The input cut into shards; with a limit, at most that many records in all, counted."""
        ...

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Yields the records of a shard in order."""
        ...
