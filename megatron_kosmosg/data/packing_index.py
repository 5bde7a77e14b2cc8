"""Where documents and rows of one packed epoch begin: built in blocks, kept in files, mapped.

An index takes 16 bytes a document and 8 a row on disk. It is built once, by the first process that
needs it, in several threads and in memory that does not grow with the dataset; restarts and other
ranks map the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_kosmosg.data.in_threads import results_in_order
from megatron_kosmosg.files import exclusive, new_folder, remove

_ARRAYS = ("documents", "document_starts", "row_starts")
_SIZES = "sizes.json"
"""Written last: a folder that has it, and files of these sizes, is whole."""
INDEX_TYPE = np.dtype("<i8")
MOST_THREADS = 8
"""That index blocks: more would wait for the one that writes, and hold more blocks in memory."""


@dataclass(frozen=True)
class EpochIndex:
    """Where documents and rows of one epoch begin, in tokens from the start of the epoch."""

    documents: np.ndarray
    """int64 [documents]: sample index, in the order of the epoch."""
    document_starts: np.ndarray
    """int64 [documents + 1]."""
    row_starts: np.ndarray
    """int64 [rows + 1]."""

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1


class RowPacker:
    """Greedy row boundaries of a stretch of tokens whose allowed cuts arrive piece by piece."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._start = 0
        """Where the open row begins."""
        self._pending = np.zeros(0, np.int64)
        """Allowed cuts after it."""

    def add(self, ends: np.ndarray) -> np.ndarray:
        """The boundaries of the rows that further cuts cannot change, int64.

        Args:
            ends: where a cut is allowed, increasing, no two further apart than `capacity`.
        """
        ends = np.concatenate([self._pending, ends])
        starts = np.concatenate([[self._start], ends[:-1]])
        following = np.searchsorted(ends, starts + self._capacity, "right")
        pieces, piece = [], 0
        while piece < len(ends) and following[piece] < len(ends):
            piece = int(following[piece])
            pieces.append(piece - 1)
        boundaries = ends[pieces]
        if pieces:
            self._start = int(boundaries[-1])
        self._pending = ends[piece:]
        return boundaries

    def finish(self) -> np.ndarray:
        """The end of the row that is still open, int64 of length one, or of length zero where none
        is."""
        return self._pending[-1:]


def pack_rows(ends: np.ndarray, capacity: int) -> np.ndarray:
    """The boundaries of greedily filled rows, int64 [rows + 1], of which the first is 0 and the
    last ends[-1]."""
    packer = RowPacker(capacity)
    return np.concatenate([[0], packer.add(ends), packer.finish()]).astype(np.int64)


class EpochIndexWriter:
    """Takes blocks of consecutive documents and their allowed cuts; files in `folder`."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {
            name: (folder / f"{name}.i64").open("wb") for name in _ARRAYS
        }
        self._counts: dict[str, int] = dict.fromkeys(_ARRAYS, 0)
        self._packer = RowPacker(capacity)
        self._put("document_starts", np.zeros(1, np.int64))
        self._put("row_starts", np.zeros(1, np.int64))

    def add(self, documents: np.ndarray, document_ends: np.ndarray, cuts: np.ndarray) -> None:
        """Sample numbers, where each document ends, and every place where a row may end."""
        self._put("documents", documents)
        self._put("document_starts", document_ends)
        self._put("row_starts", self._packer.add(cuts))

    def finish(self) -> None:
        """Completes the files of the index."""
        self._put("row_starts", self._packer.finish())
        for file in self._files.values():
            file.close()
        (self._folder / _SIZES).write_text(json.dumps(self._counts))

    def _put(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.asarray(values, INDEX_TYPE).tobytes())
        self._counts[name] += len(values)


def write_index(
    folder: Path,
    capacity: int,
    blocks: Iterable[int],
    index_block: Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> None:
    """Writes the files of an index; they do not depend on blocks or threads.

    Threads index the blocks: each finds its documents at random in files that may be larger than
    memory. What depends on the blocks before, offsets and rows, is done here as blocks come in: a
    fifth of the work in the processor's caches, a tenth out of them.

    Args:
        index_block: (documents, their starts and the end, allowed cuts) of a block, in tokens from
            its start.
    """
    writer, start = EpochIndexWriter(folder, capacity), 0
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    for found in results_in_order(index_block, blocks, 2 * threads, threads, "packing"):
        documents, document_starts, cuts = found
        if len(documents):
            writer.add(documents, document_starts[1:] + start, cuts + start)
            start += int(document_starts[-1])
    writer.finish()


def load_or_build(folder: Path, build: Callable[[Path], None]) -> EpochIndex:
    """The index in `folder`, made by `build(an empty folder)` where it is not there yet."""
    found = _load(folder)
    if found is not None:
        return found
    with exclusive(folder.with_suffix(".lock")):
        found = _load(folder)  # another process may have built it meanwhile
        if found is None:
            with suppress(OSError):
                remove(folder)
            # A lock may let everyone in: what another process has built meanwhile stays.
            with suppress(FileExistsError), new_folder(folder) as temporary:
                build(temporary)
            found = _load(folder)
    if found is None:
        raise OSError(f"the packing index {folder} cannot be read back after it was written")
    return found


def _load(folder: Path) -> EpochIndex | None:
    try:
        sizes = json.loads((folder / _SIZES).read_text())
        paths = {name: folder / f"{name}.i64" for name in _ARRAYS}
        whole = all(
            path.stat().st_size == sizes[name] * INDEX_TYPE.itemsize for name, path in paths.items()
        )
    except (FileNotFoundError, ValueError, KeyError):
        return None
    if not whole:
        return None
    return EpochIndex(**{name: np.memmap(path, INDEX_TYPE, "r") for name, path in paths.items()})
