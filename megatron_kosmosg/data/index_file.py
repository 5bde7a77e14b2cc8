"""Writes the .idx file of a Megatron indexed dataset from arrays, byte for byte as Megatron does.

Megatron's own builder needs torch (seconds of import in every process) and walks a Python list of
all sequences; here 100 million sequences are one array.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_DTYPE_CODES = {np.dtype(np.uint8): 1, np.dtype("<i4"): 4}


def write_index(
    path: Path,
    dtype: np.dtype,
    lengths: np.ndarray,
    modes: np.ndarray | None,
    sequences_per_document: np.ndarray,
) -> None:
    """`lengths`: items of `dtype` in each sequence; `modes`: one each, None for plain datasets."""
    lengths = lengths.astype(np.int32, casting="same_kind")
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    documents = np.zeros(len(sequences_per_document) + 1, np.int64)
    np.cumsum(sequences_per_document, dtype=np.int64, out=documents[1:])
    with path.open("wb") as file:
        file.write(_MAGIC)
        file.write(
            struct.pack("<QBQQ", _VERSION, _DTYPE_CODES[dtype], len(lengths), len(documents))
        )
        file.write(lengths.tobytes())
        file.write((pointers * dtype.itemsize).tobytes())
        file.write(documents.tobytes())
        if modes is not None:
            file.write(modes.astype(np.int8).tobytes())
