"""The plain text reader: a document is a stretch between blank lines, a line, or a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.preprocess.lines import (
    decode_utf8,
    line_shards,
    opened,
    read_lines,
)
from megatron_kosmosg.preprocess.options import DocumentBreak, Options
from megatron_kosmosg.preprocess.records import BadRecord, Shard, ShardSize


class TxtReader:
    """Documents as records {"text"}."""

    def __init__(self, documents: DocumentBreak) -> None:
        self._documents = documents

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """See Reader."""
        if self._documents == "line":
            return line_shards(path, limit, size.records, size.text_bytes)
        if self._documents == "file":
            return [Shard(path, 0, 0, 1)] if limit != 0 else []
        return _paragraph_shards(path, limit, size)

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Records named `file:line`, or `file#document` counted from 1."""
        for source, data in self._texts(shard):
            try:
                yield Record(source, {"text": decode_utf8(data)}, shard.path.parent)
            except Rejected as rejected:
                yield BadRecord(source, rejected)

    def _texts(self, shard: Shard) -> Iterator[tuple[str, bytes]]:
        if self._documents == "line":
            yield from read_lines(shard)
        elif self._documents == "file":
            with opened(shard.path) as file:
                yield shard.path.name, file.read()
        else:
            yield from _read_paragraphs(shard)


def _paragraph_shards(path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
    """Shards begin with a document's first line; a gzip file is one shard."""
    if path.suffix == ".gz":
        if limit is None:
            return [Shard(path, 0, 0, None)]
        size = ShardSize(1 << 62, 1 << 62, 1 << 62)
    shards: list[Shard] = []
    offset = start = first = documents = 0
    inside = False
    with opened(path) as file:
        for line in file:
            if not line.strip():
                inside = False
            elif not inside:
                if limit is not None and documents == limit:
                    break
                full = documents - first == size.records or offset - start >= size.text_bytes
                if documents > first and full:
                    shards.append(Shard(path, start, first, documents - first))
                    start, first = offset, documents
                documents += 1
                inside = True
            offset += len(line)
    if documents > first:
        shards.append(Shard(path, start, first, documents - first))
    return shards


def _read_paragraphs(shard: Shard) -> Iterator[tuple[str, bytes]]:
    number, lines = shard.first_record, []
    last = None if shard.num_records is None else number + shard.num_records
    with opened(shard.path) as file:
        file.seek(shard.offset)
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                number += 1
                yield f"{shard.path.name}#{number}", b"".join(lines)
                lines = []
                if number == last:
                    return
    if lines:
        yield f"{shard.path.name}#{number + 1}", b"".join(lines)
