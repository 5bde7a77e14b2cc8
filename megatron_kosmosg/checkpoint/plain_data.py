"""Archives that torch wrote, read as plain data: tensors, numbers, texts, numpy arrays.

`torch.load(weights_only=True)` builds nothing else; what it unpacks to is bounded here.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from numpy._core.multiarray import _reconstruct
from torch.distributed.checkpoint import ReadItem

from megatron_kosmosg.config.errors import ConfigError

COMMON_FILE = "common.pt"
"""What all ranks share: progress, layout, settings of the optimizer."""

# Random state of numpy is an array; numpy 1 pickled it under the first of the two names.
_ARRAYS = [
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
]


DAMAGE = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, AssertionError),
)
"""What torch's own reader of pickles raises for a file that is cut short or changed."""


def read_common(folder: Path) -> dict[str, Any]:
    """The state that all ranks share. Raises ConfigError if it is not plain data."""
    path = folder / COMMON_FILE
    found = read_plain(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}, not the state of a run")
    return found


def read_plain(path: Path) -> Any:
    """What torch.save was given, if it is plain data. Raises ConfigError otherwise.

    Also of a file from before torch 1.6, which is no archive.
    """
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                check_archive(file, path.stat().st_size)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise ConfigError(f"{path} cannot be read as plain data: {_short(error)}") from error


class DataPlanner(MCoreLoadPlanner):
    """Megatron-Core's planner; byte records hold plain values, tensors and numpy arrays."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raises UnpicklingError for a record that holds more than that."""
        key = read_item.dest_index.fqn
        try:
            with torch.serialization.safe_globals(_ARRAYS):
                torch.load(value, weights_only=True)
        except (pickle.UnpicklingError, struct.error) as error:
            raise pickle.UnpicklingError(f"{key} is no plain data: {_short(error)}") from None
        # The same bytes, of which it is known now that they build plain data in any reader.
        value.seek(0)
        super().load_bytes(read_item, value)


class FilePart(io.RawIOBase):
    """A span of a file; torch's own view of one seeks from its end in the wrong direction."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} is before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        found = self._file.read(max(min(len(buffer), self._length - self._position), 0))
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


def check_archive(file: BinaryIO | io.RawIOBase, length: int) -> None:
    """Refuses an archive whose contents are larger than the file, and leaves the position at the
    beginning. torch writes its archives uncompressed, so one that unpacks to more was not written
    by torch and may be meant to fill the memory."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > length:
        raise pickle.UnpicklingError(f"{length} bytes unpack to {unpacked}")
    file.seek(0)


def _short(error: BaseException) -> str:
    """The cause alone: torch adds advice on how to run what the file holds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith(("WeightsUnpickler error", "Unsupported"))]
    return (causes or lines or [type(error).__name__])[0]
