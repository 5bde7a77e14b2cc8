"""What PREFIX.bin and PREFIX.idx would hold, were the shards of a dataset joined; read in pieces.

The fingerprint of a dataset in shards is that of the joined one: checkpoints, packing indices and
cached latents of either belong to both.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import numpy as np

from megatron_kosmosg.data.fingerprint import StoredFile, fingerprint_of
from megatron_kosmosg.data.index_file import SequenceIndex, index_header
from megatron_kosmosg.data.remote_file import READS_TOGETHER
from megatron_kosmosg.data.stored_shards import StoredShards


def joined_fingerprint(shards: StoredShards) -> str:
    """The fingerprint that the joined dataset would have (fingerprint.dataset_fingerprint); only
    the shards that hold one of the blocks it reads are mapped."""
    return fingerprint_of(_JoinedIndex(shards), _JoinedData(shards))


class _JoinedData:
    """Reads the .bin files of the shards as if they were one file."""

    def __init__(self, shards: StoredShards) -> None:
        self._shards = shards
        self._starts = _ends_of([entry.num_bytes for entry in shards.entries])
        self.size = int(self._starts[-1])
        self.reads_together = READS_TOGETHER if shards.remote else 1

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on of the joined .bin file."""
        found = b""
        stop = min(start + length, self.size)
        while start < stop:
            number = int(np.searchsorted(self._starts, start, "right")) - 1
            first, end = self._starts[number : number + 2].tolist()
            found += self._read_shard(number, start - first, min(stop, end) - first)
            start = end
        return found

    def _read_shard(self, number: int, start: int, stop: int) -> bytes:
        if number in self._shards.remote:
            return self._shards[number].sequences.data.array(start, stop).tobytes()
        with closing(StoredFile(f"{self._shards.prefixes[number]}.bin")) as file:
            return file.read(start, stop - start)


class _JoinedIndex:
    """Header, lengths, pointers, documents and modes; pointers and documents count on."""

    reads_together = 1

    def __init__(self, shards: StoredShards) -> None:
        entries, index = shards.entries, shards[0].sequences.index
        self._shards = shards
        self._sequences = _ends_of([entry.num_sequences for entry in entries])
        self._bytes = _ends_of([entry.num_bytes for entry in entries])
        num_sequences = int(self._sequences[-1])
        self._header = index_header(index.dtype, num_sequences, shards.num_samples)
        stretches = [
            (self._lengths, 4, self._sequences),
            (self._pointers, 8, self._sequences),
            (self._documents, 8, np.append(shards.first_samples[:-1], shards.num_samples + 1)),
        ]
        if index.modes is not None:
            stretches.append((self._modes, 1, self._sequences))
        self._stretches = stretches
        """(what gives the values of items [a, b) of a shard, bytes of an item, first items)."""
        sizes = [len(self._header), *(size * int(ends[-1]) for _, size, ends in stretches)]
        self._starts = _ends_of(sizes)
        self.size = int(self._starts[-1])

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on of the joined .idx file."""
        stop = min(start + length, self.size)
        found = self._header[start:stop]
        for (values, size, firsts), first, end in zip(
            self._stretches, self._starts[1:-1].tolist(), self._starts[2:].tolist(), strict=True
        ):
            low, high = max(start, first) - first, min(stop, end) - first
            if low < high:
                items = _items(values, firsts, low // size, -(-high // size))
                found += items[low % size :][: high - low]
        return found

    def _lengths(self, shard: int, a: int, b: int) -> np.ndarray:
        return self._index(shard).lengths[a:b]

    def _pointers(self, shard: int, a: int, b: int) -> np.ndarray:
        return self._index(shard).pointers[a:b] + self._bytes[shard]

    def _documents(self, shard: int, a: int, b: int) -> np.ndarray:
        return self._index(shard).documents[a:b] + self._sequences[shard]

    def _modes(self, shard: int, a: int, b: int) -> np.ndarray:
        modes = self._index(shard).modes
        assert modes is not None  # all shards are of one kind
        return modes[a:b]

    def _index(self, shard: int) -> SequenceIndex:
        return self._shards[shard].sequences.index


def _items(
    values: Callable[[int, int, int], np.ndarray], firsts: np.ndarray, start: int, stop: int
) -> bytes:
    """Items [start, stop) of all shards, shard n having those from firsts[n] to firsts[n + 1]."""
    found = b""
    while start < stop:
        shard = int(np.searchsorted(firsts, start, "right")) - 1
        first, end = firsts[shard : shard + 2].tolist()
        found += values(shard, start - first, min(stop, end) - first).tobytes()
        start = end
    return found


def _ends_of(sizes: list[int]) -> np.ndarray:
    """Where each of some consecutive pieces begins, and where the last one ends: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
