"""Files of lines, also compressed: cut into shards at line ends, read back with line numbers.

What a file is compressed with is told by its first bytes: names often say otherwise, as servers and
browsers pack and unpack on the way.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_kosmosg.data.kinds.record import Rejected
from megatron_kosmosg.preprocess.arrow import open_zstandard
from megatron_kosmosg.preprocess.record_readers import Shard

MAX_TEXT_BYTES = 128 << 20
"""Of a line or a document; lines of TSV hold images."""
_PIECE = 1 << 20
PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_BEGINNINGS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "Zstandard": re.compile(rb"\x28\xb5\x2f\xfd"),
}
"""Of compressed files; texts begin with none of them."""
_BEGINNING_BYTES = 10


def line_shards(path: Path, limit: int | None, max_records: int, max_bytes: int) -> list[Shard]:
    """Shards of at most `max_records` lines or about `max_bytes`; a compressed file is one."""
    if packing(path) is not None:
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
    """Yields (`file:line`, the line without its end); lines are counted from 1, blank ones left
    out.

    A byte order mark, which editors of Windows put before a file, is no part of its first line.
    """
    with opened(shard.path) as file:
        seek(file, shard.offset)
        number, lines = shard.first_record, bounded_lines(file)
        while shard.num_records is None or number < shard.first_record + shard.num_records:
            _, line = next(lines, (0, b""))
            if not line:
                return
            if number == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            number += 1
            if line.strip():
                yield f"{shard.name}:{number}", line.rstrip(b"\r\n")


def bounded_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yields (length, line) from the file's position on; of a line longer than MAX_TEXT_BYTES only
    the beginning, which `decode_utf8` refuses."""
    while line := file.readline(MAX_TEXT_BYTES + 1):
        length, end = len(line), line[-1:]
        while length > MAX_TEXT_BYTES and end != b"\n" and (piece := file.readline(_PIECE)):
            length, end = length + len(piece), piece[-1:]
        yield length, line


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, uncompressed.

    Raises Rejected where a compressed file turns out to be damaged, and ValueError for UTF-16.
    """
    packed = packing(path)
    try:
        with _open(path, packed) as file:
            _refuse_utf16(file.peek(4)[:4], path)
            yield file
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise _damaged(packed, error) from error
    except OSError as error:
        if packed is None or error.errno is not None:
            raise  # of the file system
        raise _damaged(packed, error) from error


def packing(path: Path) -> str | None:
    """What the file is compressed with, None where it is not."""
    with path.open("rb") as file:
        start = file.read(_BEGINNING_BYTES)
    return next((name for name, begins in _BEGINNINGS.items() if begins.match(start)), None)


def seek(file: IO[bytes], offset: int) -> None:
    """Goes to where a shard starts; compressed files are one shard, and some cannot seek."""
    if offset:
        file.seek(offset)


def _damaged(packed: str | None, error: Exception) -> Rejected:
    if packed == "gzip":
        return Rejected("gzip file is damaged", str(error))
    return Rejected("compressed file is damaged", f"{packed}: {error}")


def _open(path: Path, packed: str | None) -> Any:
    """A binary file that can peek, which no common type of the library says."""
    openers: dict[str | None, Callable[[Path], Any]] = {
        "gzip": gzip.open,
        "bzip2": bz2.open,
        "xz": lzma.open,
        "Zstandard": open_zstandard,
    }
    return openers[packed](path) if packed else path.open("rb")


def _refuse_utf16(start: bytes, path: Path) -> None:
    has_mark = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    zeros = [byte == 0 for byte in start]
    if has_mark or zeros in ([False, True, False, True], [True, False, True, False]):
        raise ValueError(
            f"--input {path} is UTF-16 or UTF-32, text must be UTF-8: iconv -f UTF-16 -t UTF-8 "
            f"{path.name} > utf8-{path.name}"
        )


def decode_utf8(data: bytes) -> str:
    """The text of some bytes. Raises Rejected where they are not UTF-8 or too many."""
    if len(data) > MAX_TEXT_BYTES:
        raise Rejected("text is too long", f"more than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected("invalid UTF-8", str(error)) from error
