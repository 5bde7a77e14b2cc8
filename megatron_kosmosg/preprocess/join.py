"""Finished shards -> one dataset: duplicates found, every shard's place known, bytes copied.

Each shard is copied to its own place and then deleted, by any worker and in any order, so that a
run killed in between goes on; the disk holds the data once, plus the shards being copied.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from megatron_kosmosg.config.remote_data import url_path
from megatron_kosmosg.data.dataset_files import dataset_files
from megatron_kosmosg.data.index_file import write_index
from megatron_kosmosg.data.kinds.kind import SampleKind
from megatron_kosmosg.data.kinds.record import Rejected
from megatron_kosmosg.data.manifest import manifest_path
from megatron_kosmosg.data.sentences import sentence_paths
from megatron_kosmosg.files import open_itself, replacing
from megatron_kosmosg.preprocess.counts import Counts
from megatron_kosmosg.preprocess.rejects import reject_line, rejects_path
from megatron_kosmosg.preprocess.shard_store import ShardIndex, read_names
from megatron_kosmosg.preprocess.shard_work import ShardJob

COPY_BYTES = 4 << 20
DUPLICATE = Rejected("duplicate key")


@dataclass(frozen=True)
class CopyJob:
    """Which bytes of a shard are copied where."""

    source: str
    target: str
    offset: int
    runs: tuple[tuple[int, int], ...]
    """[start, end) bytes of the source, one run after the other."""


@dataclass(frozen=True)
class JoinPlan:
    """The contents of the joined dataset, and where each shard's part of it goes."""

    kind: SampleKind
    shards: list[ShardIndex]
    """Without duplicates."""
    copies: list[CopyJob]
    num_bytes: int
    duplicates: list[list[tuple[str, str]]]
    """(source, key) per shard of the samples that were left out."""

    def counts(self, worked: Counts) -> Counts:
        """The counts `worked`, less the duplicates."""
        num_duplicates = sum(map(len, self.duplicates))
        return replace(
            worked,
            samples=sum(len(shard.num_parts) for shard in self.shards),
            tokens=sum(int(shard.num_tokens.sum()) for shard in self.shards),
            images=sum(int(shard.num_images.sum()) for shard in self.shards),
            output_bytes=self.num_bytes,
            rejects=worked.rejects + Counter({DUPLICATE.reason: num_duplicates}),
        )


def plan_join(kind: SampleKind, jobs: list[ShardJob], joined: Path) -> JoinPlan:
    """Plans where each shard goes. Of samples with one key in one input, the first stays."""
    itemsize = kind.item_type.itemsize
    indexes = [ShardIndex.read(job.prefix) for job in jobs]
    keeps = _first_of_each_key(indexes, jobs)
    shards, copies, duplicates, offset = [], [], [], 0
    for job, index, keep in zip(jobs, indexes, keeps, strict=True):
        sizes = sample_sizes(index, itemsize)
        runs = byte_runs(sizes, keep)
        copies.append(CopyJob(f"{job.prefix}.bin", f"{joined}.bin", offset, runs))
        offset += sum(end - start for start, end in runs)
        shards.append(index if keep.all() else index.kept(keep))
        names = [] if keep.all() else read_names(job.prefix)
        duplicates.append([names[i] for i in np.flatnonzero(~keep)])
    return JoinPlan(kind, shards, copies, offset, duplicates)


def copy_shard(job: CopyJob) -> None:
    """Copies the shard's bytes to their place and deletes them; does nothing the second time."""
    source = Path(job.source)
    if not source.exists():
        return
    with source.open("rb") as reading, Path(job.target).open("r+b") as writing:
        writing.seek(job.offset)
        copy_runs(reading, writing, job.runs)
    source.unlink()


def copy_runs(reading: IO[bytes], writing: IO[bytes], runs: tuple[tuple[int, int], ...]) -> None:
    """Copies stretches [start, end) of the bytes that are read, one after the other."""
    for start, end in runs:
        reading.seek(start)
        while start < end:
            data = reading.read(min(COPY_BYTES, end - start))
            writing.write(data)
            start += len(data)


def prepare_target(plan: JoinPlan, joined: Path) -> None:
    """Makes the .bin file at its full length; what an earlier run copied stays."""
    with open_itself(Path(f"{joined}.bin"), "ab") as file:
        file.truncate(plan.num_bytes)


def write_tables(kind: SampleKind, shards: list[ShardIndex], joined: Path) -> None:
    """Writes the index and the sentence tables of the shards, one after the other."""

    def whole(name: str) -> np.ndarray:
        return np.concatenate([vars(shard)[name] for shard in shards])

    modes = None if kind.is_plain_text else whole("modes")
    write_index(Path(f"{joined}.idx"), kind.item_type, whole("lengths"), modes, whole("num_parts"))
    table_path, offsets_path = sentence_paths(joined)
    np.save(table_path, whole("sentences"))
    counts = whole("num_sentences").astype(np.int64)
    np.save(offsets_path, np.concatenate([[0], np.cumsum(counts)]))


def write_rejects(
    jobs: list[ShardJob], duplicates: list[list[tuple[str, str]]], path: Path
) -> None:
    """One file of all rejects in the order of the input; a shard's duplicates follow its others."""
    with replacing(path) as temporary, temporary.open("wb") as output:
        for number, job in enumerate(jobs):
            # A run that gave up early has not come to every shard.
            if job.rejects_path.exists():
                output.write(job.rejects_path.read_bytes())
            for source, key in duplicates[number] if duplicates else ():
                output.write(reject_line(source, key, DUPLICATE).encode())


def output_paths(prefix: str | Path) -> list[Path]:
    """Every file that a run leaves under the name of the dataset, or writes on the way there."""
    return [*dataset_files(prefix), rejects_path(prefix)]


def mark_joined(joined: Path) -> None:
    """Notes that every file is whole: from here on files only move."""
    Path(f"{joined}.complete").touch()


def is_joined(joined: Path) -> bool:
    """Whether an earlier run came to `mark_joined`; some files may have moved since."""
    return Path(f"{joined}.complete").exists()


def move_into_place(joined: Path, prefix: Path) -> None:
    """Gives the files their names; takes up again what was begun."""
    if manifest_path(joined).exists():
        # The manifest goes first and comes last: without it a dataset does not count as finished.
        manifest_path(prefix).unlink(missing_ok=True)
    for source, target in zip(dataset_files(joined), dataset_files(prefix), strict=True):
        if source.exists():
            os.replace(source, target)
    # The data is here now, whatever the dataset of that name had in object storage.
    url_path(f"{prefix}.bin").unlink(missing_ok=True)


def _first_of_each_key(indexes: list[ShardIndex], jobs: list[ShardJob]) -> list[np.ndarray]:
    """For each shard whether a sample is the first of its input with its key: bool [samples]."""
    keeps = [np.ones(len(index.keys), bool) for index in indexes]
    by_input: dict[Path, list[int]] = {}
    for number, job in enumerate(jobs):
        (path,) = job.inputs
        by_input.setdefault(path, []).append(number)
    for numbers in by_input.values():
        found = first_of_each([indexes[number].keys for number in numbers])
        for number, keep in zip(numbers, found, strict=True):
            keeps[number] = keep
    return keeps


def first_of_each(keys: list[np.ndarray]) -> list[np.ndarray]:
    """For each list of hashes whether a key comes up for the first time, in any list: bool, as long
    as the list."""
    together = np.concatenate(keys)
    _, first = np.unique(together, return_index=True)
    keep = together == b""
    keep[first] = True
    return np.split(keep, np.cumsum([len(each) for each in keys])[:-1])


def sample_sizes(index: ShardIndex, itemsize: int) -> np.ndarray:
    """Size of each sample in bytes."""
    ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)]) * itemsize
    return np.diff(ends[np.concatenate([[0], np.cumsum(index.num_parts, dtype=np.int64)])])


def byte_runs(sizes: np.ndarray, keep: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Stretches of bytes whose samples are kept."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    return tuple(zip(ends[edges[::2]].tolist(), ends[edges[1::2]].tolist(), strict=True))
