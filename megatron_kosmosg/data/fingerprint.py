"""Tells one dataset from another by its content, without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_kosmosg.config.remote_data import allowed_url
from megatron_kosmosg.data.data_file import is_remote
from megatron_kosmosg.data.in_threads import results_in_order
from megatron_kosmosg.data.remote_file import RemoteFile

BLOCK_BYTES, NUM_BLOCKS = 4096, 256
"""What is read of each file: evenly spaced blocks, all of a file of up to 1 MiB."""


class Readable(Protocol):
    """Anything whose bytes can be read by position: a file, or what stands for one."""

    size: int
    reads_together: int
    """Threads that may usefully read at once; 1: it is read by one."""

    def read(self, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start` on, fewer at the end."""
        ...


class StoredFile:
    """A file on disk, read by position."""

    reads_together = 1

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


def stored_data(prefix: str | Path) -> StoredFile | RemoteFile:
    """PREFIX.bin, on disk or in object storage."""
    path = f"{prefix}.bin"
    return RemoteFile(allowed_url(path)) if is_remote(prefix) else StoredFile(path)


def dataset_fingerprint(prefix: str | Path) -> str:
    """Hash of sizes and evenly spaced blocks of PREFIX.bin and PREFIX.idx.

    Another number, order or length of samples changes the index and thus the hash. A byte changed
    in place in a large file may go unnoticed.
    """
    with closing(StoredFile(f"{prefix}.idx")) as index, closing(stored_data(prefix)) as data:
        return fingerprint_of(index, data)


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
        for block in _blocks(file, starts.tolist()):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: Readable, starts: list[int]) -> Iterator[bytes]:
    """The blocks that begin at `starts`, in their order."""
    read = partial(file.read, length=BLOCK_BYTES)
    if file.reads_together == 1:
        return map(read, starts)
    threads = file.reads_together
    return results_in_order(read, starts, threads, threads, "fingerprint")
