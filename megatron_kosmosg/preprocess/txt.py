"""The plain text reader: a document is a stretch between blank lines, a line, or a file.

A stretch without a blank line can be a whole corpus, such as a line for each sentence. It is cut
into documents of a bounded size, so that neither memory nor the work of one process grows with it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.preprocess.lines import (
    MAX_TEXT_BYTES,
    decode_utf8,
    line_shards,
    opened,
    packing,
    read_lines,
    seek,
)
from megatron_kosmosg.preprocess.options import DocumentBreak, Options
from megatron_kosmosg.preprocess.record_readers import BadRecord, Shard, ShardSize

MAX_DOCUMENT_BYTES = 1 << 20
CUT = "documents cut after 1 MiB without a blank line"


class TxtReader:
    """Reads documents as records {"text"}."""

    def __init__(self, documents: DocumentBreak) -> None:
        self._documents = documents

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """Cuts the file into shards, as Reader asks for."""
        if self._documents == "line":
            return line_shards(path, limit, size.records, size.text_bytes)
        if self._documents == "file":
            return [Shard(path, 0, 0, 1)] if limit != 0 else []
        return _paragraph_shards(path, limit, size)

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Records named `file:line`, or `file#document` counted from 1."""
        for source, data, note in self._texts(shard):
            try:
                yield Record(source, {"text": decode_utf8(data)}, shard.path.parent, note=note)
            except Rejected as rejected:
                yield BadRecord(source, rejected)

    def _texts(self, shard: Shard) -> Iterator[tuple[str, bytes, str | None]]:
        """Yields (source, document, note) of each document."""
        if self._documents == "line":
            for source, line in read_lines(shard):
                yield source, line, None
        elif self._documents == "file":
            with opened(shard.path) as file:
                content = file.read(MAX_TEXT_BYTES + 1)  # one too long is refused by its length
                yield shard.name, content.removeprefix(codecs.BOM_UTF8), None
        else:
            yield from _read_paragraphs(shard)


def _paragraph_shards(path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
    """Shards begin with a document's first line; a compressed file is one shard."""
    if packing(path) is not None:
        if limit is None:
            return [Shard(path, 0, 0, None)]
        size = ShardSize(1 << 62, 1 << 62, 1 << 62)
    shards: list[Shard] = []
    start = first = documents = 0
    with opened(path) as file:
        for document in _paragraphs(file, 0):
            if limit is not None and documents == limit:
                break
            is_full = document.start - start >= size.text_bytes
            if documents > first and (is_full or documents - first == size.records):
                shards.append(Shard(path, start, first, documents - first))
                start, first = document.start, documents
            documents += 1
    if documents > first:
        shards.append(Shard(path, start, first, documents - first))
    return shards


def _read_paragraphs(shard: Shard) -> Iterator[tuple[str, bytes, str | None]]:
    number = shard.first_record
    last = None if shard.num_records is None else number + shard.num_records
    with opened(shard.path) as file:
        seek(file, shard.offset)
        for document in _paragraphs(file, shard.offset):
            number += 1
            note = CUT if document.is_cut else None
            yield f"{shard.name}#{number}", document.data, note
            if number == last:
                return


@dataclass(frozen=True)
class _Document:
    start: int
    """Byte of the file."""
    data: bytes
    is_cut: bool
    """Whether it goes on after its end."""


def _paragraphs(file: IO[bytes], start: int) -> Iterator[_Document]:
    """Yields the paragraphs from the file's position `start` on. Memory does not grow with a
    document."""
    lines: list[bytes] = []
    at, length = start, 0
    for line in _pieces(file):
        is_blank = not line.strip()
        if lines and (is_blank or length + len(line) > MAX_DOCUMENT_BYTES):
            yield _Document(at - length, _joined(lines, at == length), not is_blank)
            lines, length = [], 0
        at += len(line)
        if not is_blank:
            lines.append(line)
            length += len(line)
    if lines:
        yield _Document(at - length, _joined(lines, at == length), False)


def _joined(lines: list[bytes], is_first: bool) -> bytes:
    """The text, without the byte order mark that editors of Windows put before a file."""
    data = b"".join(lines)
    return data.removeprefix(codecs.BOM_UTF8) if is_first else data


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Lines; one longer than a document may be comes in pieces, cut after a space if it has any,
    otherwise between two characters."""
    rest = b""
    while piece := rest + file.readline(MAX_DOCUMENT_BYTES - len(rest)):
        rest = b""
        if len(piece) == MAX_DOCUMENT_BYTES and not piece.endswith(b"\n"):
            end = piece.rfind(b" ") + 1 or _last_character(piece)
            piece, rest = piece[:end], piece[end:]
        yield piece


def _last_character(data: bytes) -> int:
    """The place where the last character begins, which may be cut."""
    at = len(data) - 1
    while at > len(data) - 4 and data[at] & 0xC0 == 0x80:
        at -= 1
    return at
