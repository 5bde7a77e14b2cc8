"""The .idx file of a Megatron indexed dataset: written byte for byte as Megatron does, and mapped.

Megatron's own builder needs torch (seconds of import in every process) and walks a Python list of
all sequences; here 100 million sequences are one array. Its own reader keeps three descriptors open
and closes its mapping when it is collected, whatever still points there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_kosmosg.data.mapped_file import map_file

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the type, sequences, documents + 1."""
_TYPES = {
    code: np.dtype(name)
    for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), 1)
}
_DTYPE_CODES = {np.dtype(np.uint8): 1, np.dtype("<i4"): 4}


@dataclass(frozen=True)
class SequenceIndex:
    """What an .idx file says; arrays of the mapped file, which are not checked one by one."""

    dtype: np.dtype
    """Of the items of a sequence."""
    lengths: np.ndarray
    """int32 [sequences]: items."""
    pointers: np.ndarray
    """int64 [sequences]: byte in the .bin file where it begins."""
    documents: np.ndarray
    """int64 [documents + 1]: first sequence of each document, and the number of sequences."""
    modes: np.ndarray | None
    """int8 [sequences], None where sequences have none."""


def index_header(dtype: np.dtype, num_sequences: int, num_documents: int) -> bytes:
    """The header with which an .idx file begins."""
    return _HEADER.pack(_MAGIC, _VERSION, _DTYPE_CODES[dtype], num_sequences, num_documents + 1)


def index_bytes(num_sequences: int, num_documents: int, has_modes: bool) -> int:
    """Size of a whole .idx file in bytes."""
    return _HEADER.size + num_sequences * (12 + has_modes) + 8 * (num_documents + 1)


def read_index(path: Path, has_modes: bool) -> SequenceIndex:
    """The index, mapped; the time does not depend on its size.

    Raises OSError, and ValueError where it is no index or the file ends before it.
    """
    data = map_file(path)
    if len(data) < _HEADER.size:
        raise ValueError(f"{len(data)} bytes")
    header = data[: _HEADER.size].tobytes()
    magic, version, code, num_sequences, num_offsets = _HEADER.unpack(header)
    if magic != _MAGIC or version != _VERSION or code not in _TYPES:
        raise ValueError(f"begins with {bytes(data[:18])!r}")
    needed = index_bytes(num_sequences, num_offsets - 1, has_modes)
    if num_offsets < 1 or needed > len(data):
        raise ValueError(f"{len(data)} bytes, its counts need {needed}")
    at = _HEADER.size

    def array(dtype: str, count: int) -> np.ndarray:
        nonlocal at
        found = np.frombuffer(data, dtype, count, at)
        at += found.nbytes
        return found

    return SequenceIndex(
        _TYPES[code],
        array("<i4", num_sequences),
        array("<i8", num_sequences),
        array("<i8", num_offsets),
        array("i1", num_sequences) if has_modes else None,
    )


def write_index(
    path: Path,
    dtype: np.dtype,
    lengths: np.ndarray,
    modes: np.ndarray | None,
    sequences_per_document: np.ndarray,
) -> None:
    """Writes an .idx file.

    Args:
        dtype: type of the items of the .bin file.
        lengths: number of items of `dtype` in each sequence.
        modes: one mode a sequence; None for plain datasets, which have none.
    """
    lengths = lengths.astype(np.int32, casting="same_kind")
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    documents = np.zeros(len(sequences_per_document) + 1, np.int64)
    np.cumsum(sequences_per_document, dtype=np.int64, out=documents[1:])
    with path.open("wb") as file:
        file.write(index_header(dtype, len(lengths), len(sequences_per_document)))
        file.write(lengths.tobytes())
        file.write((pointers * dtype.itemsize).tobytes())
        file.write(documents.tobytes())
        if modes is not None:
            file.write(modes.astype(np.int8).tobytes())
