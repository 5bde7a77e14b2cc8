"""The sequences of a Megatron indexed dataset: one pair of .bin and .idx files. Both are mapped;
the .bin may lie in object storage (data_file.py).

To open it costs the same whatever it holds: the sizes of the files are compared with the last entry
of the index. Every other entry is checked when it is used, or by `check_entries`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.data_file import open_data
from megatron_kosmosg.data.index_file import read_index

_BLOCK = 1 << 20
"""Entries that are checked together."""


class MappedSequences:
    """Random access to PREFIX.bin by PREFIX.idx; safe to use from several threads."""

    def __init__(self, prefix: str | Path, has_modes: bool) -> None:
        """Opens both files. Raises OSError where a file cannot be opened, InputError where they do
        not fit each other, and what `open_data` raises.

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
        index = self.index
        if index.documents[0] != 0 or index.documents[-1] != len(self):
            raise self._out_of_order()
        needed = 0
        if len(self):
            needed = int(index.pointers[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
        self.data = open_data(prefix, needed)

    def __len__(self) -> int:
        return len(self.index.lengths)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        """(the sequence in the index's type, its mode or 0), as `take` gives it."""
        return next(self.take(range(number, number + 1)))

    def take(self, numbers: range) -> Iterator[tuple[np.ndarray, int]]:
        """Yields (the sequence in the index's type, its mode or 0) for each of some sequences that
        stand together, such as a document's; mapped data is not copied, other data is read at once.

        Raises InputError where the index says that one lies outside of the file, StorageError.
        """
        index = self.index
        if not numbers:
            return
        pieces = [self._place(number) for number in numbers]
        first, last = pieces[0][0], pieces[-1][1]
        if [start for start, _ in pieces[1:]] != [stop for _, stop in pieces[:-1]]:
            if len(numbers) > 1:  # not written by this package, each by itself
                for number in numbers:
                    yield from self.take(range(number, number + 1))
                return
        data = self.data.array(first, last)
        for number, (start, stop) in zip(numbers, pieces, strict=True):
            mode = 0 if index.modes is None else int(index.modes[number])
            yield data[start - first : stop - first].view(index.dtype), mode

    def _place(self, number: int) -> tuple[int, int]:
        """The bytes [start, stop) of a sequence."""
        index, size = self.index, self.data.size
        start, length = int(index.pointers[number]), int(index.lengths[number])
        stop = start + length * index.dtype.itemsize
        if start < 0 or length < 0 or stop > size:
            raise InputError(
                f"{self.prefix}.idx is damaged: sequence {number} is said to be bytes {start} to "
                f"{stop} of {size}"
            )
        return start, stop

    @property
    def num_bytes(self) -> int:
        """Size of the .bin file."""
        return self.data.size

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
            bad = np.flatnonzero((pointers < 0) | (lengths < 0) | (stops > self.data.size))
            if bad.size:
                yield f"{self.prefix}.idx is damaged: sequence {first + bad[0]} lies outside"
                break

    def _out_of_order(self) -> InputError:
        return InputError(f"{self.prefix}.idx is damaged: its documents do not follow each other")
