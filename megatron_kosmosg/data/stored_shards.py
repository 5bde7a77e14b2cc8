"""The files of a dataset, in one piece or in shards: a sample's number -> its shard and its place.

A shard is mapped when the first of its samples is read. Everything here costs what the number of
shards asks for, not the number of samples.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

import numpy as np

from megatron_kosmosg.config.dataset_prefixes import shard_prefix
from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.mapped_file import map_array
from megatron_kosmosg.data.mapped_sequences import MappedSequences
from megatron_kosmosg.data.sentences import sentence_paths
from megatron_kosmosg.data.shard_list import ShardEntry


class StoredShard:
    """One pair of files and its sentence tables; safe to read from several threads."""

    def __init__(self, prefix: str, has_modes: bool, entry: ShardEntry | None = None) -> None:
        """Opens the files. Raises what MappedSequences raises, and InputError where they hold
        something else.

        Args:
            entry: what the dataset's manifest says of this shard; None for a dataset in one piece.
        """
        self.prefix = prefix
        self.sequences = MappedSequences(prefix, has_modes)
        found = (self.sequences.num_documents, len(self.sequences))
        if entry is not None and found != (entry.num_samples, entry.num_sequences):
            raise InputError(
                f"shard {prefix} holds {found[0]} samples of {found[1]} parts, the manifest of its "
                f"dataset says {entry.num_samples} and {entry.num_sequences}: another shard has "
                "its name"
            )

    @cached_property
    def sentences(self) -> tuple[np.ndarray, np.ndarray]:
        """The (table, offsets) of the shard's sentences (sentences.py), mapped. Raises OSError,
        InputError, ValueError."""
        table, offsets = (map_array(path) for path in sentence_paths(self.prefix))
        if len(offsets) != self.sequences.num_documents + 1 or offsets[-1] != len(table):
            raise InputError(
                f"{sentence_paths(self.prefix)[1]} does not fit {self.prefix}.idx; preprocess the "
                "dataset again"
            )
        return table, offsets


class StoredShards:
    """All of them, in order; safe to use from several threads."""

    def __init__(
        self,
        prefix: str,
        entries: Sequence[ShardEntry],
        has_modes: bool,
        remote: Collection[int] = (),
    ) -> None:
        """Lists the shards; each is opened when it is first asked for.

        Args:
            entries: the shards that the manifest lists; empty for a dataset in one piece, which is
                opened at once.
            remote: numbers of those whose .bin lies in object storage. The first of them is asked
                for at once, so that a package or an account that is missing is not found out later.
        """
        self._has_modes, self.entries = has_modes, tuple(entries)
        self.prefixes = [shard_prefix(prefix, entry.path) for entry in entries] or [prefix]
        self._opened: list[StoredShard | None] = [None] * len(self.prefixes)
        self._opening = threading.Lock()
        sizes = [e.num_samples for e in entries] or [self[0].sequences.num_documents]
        self.first_samples = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        """int64 [shards + 1], the last the number of samples."""
        self.remote = frozenset(remote)
        if self.remote:
            self[min(self.remote)].sequences.data.check()

    def __len__(self) -> int:
        return len(self.prefixes)

    def __getitem__(self, number: int) -> StoredShard:
        """Shard number `number`, mapped when it is first asked for."""
        shard = self._opened[number]
        if shard is None:
            with self._opening:
                shard = self._opened[number]
                if shard is None:
                    entry = self.entries[number] if self.entries else None
                    shard = StoredShard(self.prefixes[number], self._has_modes, entry)
                    self._opened[number] = shard
        return shard

    @property
    def num_samples(self) -> int:
        return int(self.first_samples[-1])

    def locate(self, sample: int) -> tuple[StoredShard, int]:
        """(the sample's shard, its number there). Raises IndexError."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of {self.num_samples}")
        number = int(np.searchsorted(self.first_samples, sample, "right")) - 1
        return self[number], sample - int(self.first_samples[number])

    def groups(
        self, samples: np.ndarray
    ) -> Iterator[tuple[StoredShard, np.ndarray | slice, np.ndarray]]:
        """Yields (shard, places in `samples`, their numbers in the shard) for each shard that holds
        any of them."""
        if len(self) == 1:
            yield self[0], slice(None), samples
            return
        numbers = np.searchsorted(self.first_samples, samples, "right") - 1
        order = np.argsort(numbers, kind="stable")
        edges = np.flatnonzero(np.diff(numbers[order], prepend=-1, append=len(self)))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            places = order[start:stop]
            number = int(numbers[places[0]])
            yield self[number], places, samples[places] - self.first_samples[number]


class SentenceTables:
    """The sentences of samples, found by the samples' numbers (sentences.py explains what they are
    for)."""

    def __init__(self, shards: StoredShards) -> None:
        self._shards = shards

    @property
    def is_empty(self) -> bool:
        """Whether no sample has any sentence."""
        return all(len(self._table(self._shards[i])[0]) == 0 for i in range(len(self._shards)))

    def take(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sentences of the samples, one sample after the other, int32 [sentences, 2], and how
        many each sample has, int64 [samples]."""
        samples = np.asarray(samples, np.int64)
        counts = np.zeros(len(samples), np.int64)
        found = []
        for shard, places, numbers in self._shards.groups(samples):
            table, offsets = self._table(shard)
            starts = offsets[numbers]
            counts[places] = offsets[numbers + 1] - starts
            found.append((table, places, starts))
        ends = np.cumsum(counts)
        firsts = ends - counts
        rows = np.empty((int(ends[-1]) if len(ends) else 0, 2), np.int32)
        for table, places, starts in found:
            group_counts = counts[places]
            within = np.arange(group_counts.sum()) - np.repeat(
                np.cumsum(group_counts) - group_counts, group_counts
            )
            chosen = table[np.repeat(starts, group_counts) + within]
            if isinstance(places, slice):
                rows = chosen
            else:
                rows[np.repeat(firsts[places], group_counts) + within] = chosen
        return rows, counts

    def _table(self, shard: StoredShard) -> tuple[np.ndarray, np.ndarray]:
        return shard.sentences


class ComputedSentences(SentenceTables):
    """The sentences of a dataset that another tool wrote. It has no tables on disk, so they are
    computed and held in memory."""

    def __init__(self, shards: StoredShards, table: np.ndarray, offsets: np.ndarray) -> None:
        super().__init__(shards)
        self._computed = table, offsets

    def _table(self, shard: StoredShard) -> tuple[np.ndarray, np.ndarray]:
        return self._computed
