"""Tells one dataset from another by its content, without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np

BLOCK_BYTES, NUM_BLOCKS = 4096, 256
"""What is read of each file: evenly spaced blocks, all of a file of up to 1 MiB."""


class Readable(Protocol):
    """Anything whose bytes can be read by position: a file, or what stands for one."""

    size: int

    def read(self, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start` on, fewer at the end."""
        ...


class StoredFile:
    """A file on disk, read by position."""

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("rb")
        self.size = Path(path).stat().st_size

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on; fewer at the end of the file."""
        self._file.seek(start)
        return self._file.read(length)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def dataset_fingerprint(prefix: str | Path) -> str:
    """Hash of sizes and evenly spaced blocks of PREFIX.bin and PREFIX.idx.

    Another number, order or length of samples changes the index and thus the hash. A byte changed
    in place in a large file may go unnoticed.
    """
    files = [StoredFile(f"{prefix}{end}") for end in (".idx", ".bin")]
    try:
        return fingerprint_of(*files)
    finally:
        for file in files:
            file.close()


def fingerprint_of(index: Readable, data: Readable) -> str:
    """The fingerprint of a dataset by its index and the data that this describes, wherever both
    lie."""
    digest = hashlib.blake2b(digest_size=12, person=b"kosmosg-dataset")
    for end, file in ((".idx", index), (".bin", data)):
        digest.update(f"{end} {file.size}|".encode())
        last = max(0, file.size - BLOCK_BYTES)
        starts = np.unique(np.linspace(0, last, NUM_BLOCKS).astype(np.int64))
        if file.size <= BLOCK_BYTES * NUM_BLOCKS:
            starts = np.arange(0, file.size, BLOCK_BYTES)
        for start in starts.tolist():
            digest.update(file.read(start, BLOCK_BYTES))
    return digest.hexdigest()
