"""The sequences of a Megatron indexed dataset, mapped from disk.

Megatron's own reader closes its mapping when it is collected, whatever still points there: to read
an array of a dataset that is gone ends the process. Arrays from here keep the mapping open.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset


class MappedSequences:
    """Random access to PREFIX.bin by the index of Megatron; safe to use from several threads."""

    def __init__(self, prefix: str | Path, multimodal: bool) -> None:
        """`multimodal`: whether sequences have modes. Raises what Megatron raises."""
        self._dataset = _Indexed(str(prefix), multimodal=multimodal)
        self.index = self._dataset.index
        """Megatron's: sequence_lengths, sequence_modes, dtype; a view of the open file."""
        self._bytes = np.asarray(np.memmap(f"{prefix}.bin", np.uint8, "r"))

    @property
    def document_indices(self) -> np.ndarray:
        """int64 [documents + 1]: first sequence of each document, and the number of sequences."""
        return self._dataset.document_indices

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        """(the sequence in the index's type, its mode or 0), mapped and not copied."""
        start, length, mode = self.index[number]
        dtype = np.dtype(self.index.dtype)
        stored = self._bytes[int(start) : int(start) + int(length) * dtype.itemsize]
        return stored.view(dtype), int(mode or 0)


class _Indexed(IndexedDataset):
    """One that can also be collected where its files could not be opened: Megatron's then prints
    an AttributeError of its own after the error that says what is wrong."""

    def __del__(self) -> None:
        for name in ("bin_reader", "index"):
            self.__dict__.pop(name, None)
