"""The .bin file of a dataset or a shard, wherever it lies: mapped, or in object storage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.config.remote_data import allowed_url, url_path
from megatron_kosmosg.data.mapped_file import map_file
from megatron_kosmosg.data.remote_file import RemoteFile


class DataFile(Protocol):
    """Bytes by position; safe to read from several threads."""

    size: int

    def check(self) -> None:
        """Raises what is wrong with the file as a whole, where that was not looked at before."""
        ...

    def array(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop), which lie in the file: uint8, read-only."""
        ...


class MappedFile:
    """A file on this machine's file systems; its bytes are mapped and not copied."""

    def __init__(self, path: str, size: int) -> None:
        """Maps it. Raises OSError, and InputError where it has another size."""
        self._bytes = map_file(path)
        self.size = len(self._bytes)
        if self.size != size:
            raise InputError(f"{path} has {self.size} bytes, its index needs {size}")

    def check(self) -> None:
        """Does nothing: the size is right."""

    def array(self, start: int, stop: int) -> np.ndarray:
        return self._bytes[start:stop]


def open_data(prefix: str | Path, size: int) -> DataFile:
    """PREFIX.bin where it is there, else what PREFIX.bin.url names.

    Args:
        size: in bytes, by the index. Object storage is asked whether it has that when it is first
            read.

    Raises what MappedFile and `allowed_url` raise.
    """
    path = f"{prefix}.bin"
    return RemoteFile(allowed_url(path), size) if is_remote(prefix) else MappedFile(path, size)


def is_remote(prefix: str | Path) -> bool:
    """Whether PREFIX.bin lies in object storage: a file of that name comes first, but no link that
    leads nowhere."""
    path = f"{prefix}.bin"
    return not os.path.exists(path) and os.path.lexists(url_path(path))
