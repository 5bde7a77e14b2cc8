"""The sequences of a Megatron indexed dataset, mapped from disk: one pair of .bin and .idx files.

To open it costs the same whatever it holds: the sizes of the files are compared with the last entry
of the index. Every other entry is checked when it is used, or by `check_entries`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.index_file import read_index
from megatron_kosmosg.data.mapped_file import map_file

_BLOCK = 1 << 20
"""Entries that are checked together."""


class MappedSequences:
    """Random access to PREFIX.bin by PREFIX.idx; safe to use from several threads."""

    def __init__(self, prefix: str | Path, has_modes: bool) -> None:
        """Maps both files. Raises OSError where a file cannot be opened, InputError where they do
        not fit each other.

        Args:
            has_modes: whether it is a multimodal dataset.
        """
        self.prefix = str(prefix)
        try:
            self.index = read_index(Path(f"{prefix}.idx"), has_modes)
        except ValueError as error:
            raise InputError(
                f"{prefix}.idx is no whole index of a Megatron dataset ({error}); preprocess the "
                "dataset again"
            ) from None
        self._bytes = map_file(f"{prefix}.bin")
        index, stored = self.index, len(self._bytes)
        if index.documents[0] != 0 or index.documents[-1] != len(self):
            raise self._out_of_order()
        needed = 0
        if len(self):
            needed = int(index.pointers[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
        if stored != needed:
            raise InputError(f"{prefix}.bin has {stored} bytes, its index needs {needed}")

    def __len__(self) -> int:
        return len(self.index.lengths)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        """(the sequence in the index's type, its mode or 0); the data is mapped and not copied.

        Raises InputError where the index says that it lies outside of the file.
        """
        index = self.index
        start, length = int(index.pointers[number]), int(index.lengths[number])
        stop = start + length * index.dtype.itemsize
        if start < 0 or length < 0 or stop > len(self._bytes):
            raise InputError(
                f"{self.prefix}.idx is damaged: sequence {number} is said to be bytes {start} to "
                f"{stop} of {len(self._bytes)}"
            )
        mode = 0 if index.modes is None else int(index.modes[number])
        return self._bytes[start:stop].view(index.dtype), mode

    @property
    def num_documents(self) -> int:
        return len(self.index.documents) - 1

    def document(self, number: int) -> range:
        """The numbers of a document's sequences. Raises InputError where the index is damaged
        there."""
        first, last = self.index.documents[number : number + 2].tolist()
        if not 0 <= first <= last <= len(self):
            raise self._out_of_order()
        return range(first, last)

    def check_entries(self) -> Iterator[str]:
        """Yields what is wrong with the index, of each fault the first; the index is read as a
        whole, in blocks."""
        index = self.index
        for first in range(0, self.num_documents, _BLOCK):
            documents = index.documents[first : first + _BLOCK + 1]
            if (documents[1:] < documents[:-1]).any():
                yield str(self._out_of_order())
                break
        for first in range(0, len(self), _BLOCK):
            lengths = index.lengths[first : first + _BLOCK].astype(np.int64)
            pointers = index.pointers[first : first + _BLOCK]
            stops = pointers + lengths * index.dtype.itemsize
            bad = np.flatnonzero((pointers < 0) | (lengths < 0) | (stops > len(self._bytes)))
            if bad.size:
                yield f"{self.prefix}.idx is damaged: sequence {first + bad[0]} lies outside"
                break

    def _out_of_order(self) -> InputError:
        return InputError(f"{self.prefix}.idx is damaged: its documents do not follow each other")
