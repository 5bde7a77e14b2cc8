"""Files of lines, also gzipped: cut into shards at line ends, and read back with line numbers."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_kosmosg.data.kinds.record import Rejected
from megatron_kosmosg.preprocess.records import Shard

MAX_TEXT_BYTES = 128 << 20
"""Of a line or a document; lines of TSV hold pictures."""
_PIECE = 1 << 20


def line_shards(path: Path, limit: int | None, max_records: int, max_bytes: int) -> list[Shard]:
    """Shards of at most `max_records` lines or about `max_bytes`; a gzip file is one shard."""
    if path.suffix == ".gz":
        if limit is None:
            return [Shard(path, 0, 0, None)]
        max_records = max_bytes = 1 << 62
    shards: list[Shard] = []
    offset = start = first = lines = 0
    with opened(path) as file:
        for length, _ in bounded_lines(file):
            if limit is not None and lines == limit:
                break
            if lines - first == max_records or offset - start >= max_bytes:
                shards.append(Shard(path, start, first, lines - first))
                start, first = offset, lines
            offset += length
            lines += 1
    if lines > first:
        shards.append(Shard(path, start, first, lines - first))
    return shards


def read_lines(shard: Shard) -> Iterator[tuple[str, bytes]]:
    """(`file:line`, the line without its end); lines are counted from 1, blank ones left out.

    A byte order mark, which editors of Windows put before a file, is no part of its first line.
    """
    with opened(shard.path) as file:
        file.seek(shard.offset)
        number, lines = shard.first_record, bounded_lines(file)
        while shard.num_records is None or number < shard.first_record + shard.num_records:
            _, line = next(lines, (0, b""))
            if not line:
                return
            if number == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            number += 1
            if line.strip():
                yield f"{shard.path.name}:{number}", line.rstrip(b"\r\n")


def bounded_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(length, line) from the file's position on; of a line longer than MAX_TEXT_BYTES only its
    beginning, which `decode_utf8` refuses."""
    while line := file.readline(MAX_TEXT_BYTES + 1):
        length, end = len(line), line[-1:]
        while length > MAX_TEXT_BYTES and end != b"\n" and (piece := file.readline(_PIECE)):
            length, end = length + len(piece), piece[-1:]
        yield length, line


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, uncompressed. Raises Rejected where a gzip file turns out to be damaged."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise Rejected("gzip file is damaged", str(error)) from error


def decode_utf8(data: bytes) -> str:
    """Text. Raises Rejected."""
    if len(data) > MAX_TEXT_BYTES:
        raise Rejected("text is too long", f"more than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected("invalid UTF-8", str(error)) from error
