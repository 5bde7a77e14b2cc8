"""A dataset in shards of a size that the user sets, written where they stay: no byte is copied.

A shard takes whole inputs until they reach that size, or a part of an input that is larger. One
worker reads them one after the other; PREFIX.shards/NNNNN gets the files, PREFIX.json lists them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from megatron_kosmosg.config.dataset_prefixes import stored_prefixes
from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.manifest import Manifest, manifest_path
from megatron_kosmosg.data.shard_list import MOST_SHARDS, ShardEntry
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.files import open_itself, remove_folder
from megatron_kosmosg.preprocess.counts import Counts
from megatron_kosmosg.preprocess.join import (
    DUPLICATE,
    byte_runs,
    copy_runs,
    first_of_each,
    is_joined,
    mark_joined,
    sample_sizes,
    write_rejects,
    write_tables,
)
from megatron_kosmosg.preprocess.record_readers import ShardSize
from megatron_kosmosg.preprocess.rejects import rejects_path
from megatron_kosmosg.preprocess.shard_store import ShardIndex, read_names
from megatron_kosmosg.preprocess.shard_work import ShardJob, Stretch, encoders
from megatron_kosmosg.preprocess.shards_of_dataset import joined_manifest, shard_entry
from megatron_kosmosg.preprocess.work_folder import WorkFolder
from megatron_kosmosg.preprocess.workers import Workers

ENDING = ".shards"


def shards_folder(prefix: str | Path) -> Path:
    """The folder of a dataset's shards: PREFIX.shards."""
    return Path(f"{prefix}{ENDING}")


def grouped(
    stretches: Sequence[Stretch], size: ShardSize, most_bytes: float
) -> list[tuple[Stretch, ...]]:
    """The stretches of each shard; depends on the inputs and `most_bytes` alone.

    Raises InputError where there would be more shards than a dataset may have.
    """
    groups: list[tuple[Stretch, ...]] = []
    open_group: list[Stretch] = []
    open_bytes = 0.0
    for path, found in groupby(stretches, key=lambda stretch: stretch[0].path):
        of_input = list(found)
        num_bytes = _bytes_of(path, of_input, size)
        if open_group and open_bytes + num_bytes > most_bytes:
            groups.append(tuple(open_group))
            open_group, open_bytes = [], 0.0
        if num_bytes > most_bytes:
            together = max(1, int(len(of_input) * most_bytes / num_bytes))
            starts = range(0, len(of_input), together)
            groups += [tuple(of_input[i : i + together]) for i in starts]
        else:
            open_group += of_input
            open_bytes += num_bytes
    if open_group:
        groups.append(tuple(open_group))
    if len(groups) > MOST_SHARDS:
        raise InputError(f"--shard-gib: {len(groups)} shards, more than {MOST_SHARDS}; raise it")
    return groups


def _bytes_of(path: Path, stretches: list[Stretch], size: ShardSize) -> float:
    """The size of an input in bytes. A folder's own size says nothing, so it counts as many as its
    stretches were made for."""
    return len(stretches) * size.image_bytes if path.is_dir() else path.stat().st_size


def refuse_other_forms(prefix: Path, in_shards: bool, folder: WorkFolder) -> None:
    """Raises InputError where PREFIX is a dataset of the other form, or its shards' folder is
    something else's."""
    path, shards = manifest_path(prefix), shards_folder(prefix)
    listed = stored_prefixes(prefix) != [str(prefix)]
    if not in_shards and listed:
        raise InputError(
            f"{prefix} is a dataset in shards; give --shard-gib, another --output-prefix, or "
            f"delete {path}"
        )
    if in_shards and any(os.path.lexists(f"{prefix}{end}") for end in (".bin", ".bin.url")):
        raise InputError(
            f"{prefix} is a dataset in one piece; leave out --shard-gib, give another "
            f"--output-prefix, or delete {prefix}.bin, and {prefix}.bin.url if it is there"
        )
    if in_shards and os.path.lexists(shards) and not listed and not is_joined(_joined(folder)):
        raise InputError(f"{shards} is there and {path} lists no shards; delete that folder")


@dataclass(frozen=True)
class _Finish:
    """A shard whose samples are written, to be completed under its name."""

    job: ShardJob
    target: Path
    duplicates: np.ndarray
    """Numbers of samples that are left out."""
    num_rejects: int


def write_in_shards(
    prefix: Path,
    jobs: list[ShardJob],
    folder: WorkFolder,
    worked: Counts,
    check: Callable[[Counts], None],
    workers: Workers,
) -> Counts:
    """Completes what `jobs` have written; the counts without duplicates.

    `check`: raises what is wrong with these counts.
    """
    joined = _joined(folder)
    duplicates = _duplicates(jobs, workers)
    is_done = workers.lead(lambda: is_joined(joined))
    num_duplicates = sum(map(len, duplicates))
    rejects = worked.rejects + Counter({DUPLICATE.reason: num_duplicates})
    counts = replace(worked, samples=worked.samples - num_duplicates, rejects=rejects)

    def note() -> None:
        names = [_names(job, found) for job, found in zip(jobs, duplicates, strict=True)]
        write_rejects(jobs, names, rejects_path(prefix))
        check(counts)

    workers.lead(note)
    if not is_done:
        to_finish = workers.lead(lambda: _to_finish(jobs, duplicates, folder))
        finished = workers.map(_finish, to_finish)

        def write() -> None:
            entries = [
                replace(entry, path=f"{shards_folder(prefix).name}/{Path(entry.path).name}")
                for _, entry in finished
            ]
            made = joined_manifest([manifest for manifest, _ in finished], entries)
            replace(made, num_rejects=counts.rejects.total()).write(manifest_path(joined))
            mark_joined(joined)

        workers.lead(write)
    manifest = workers.lead(lambda: _move_into_place(folder, prefix))
    return replace(
        counts,
        tokens=manifest.num_tokens,
        images=manifest.num_images,
        output_bytes=sum(entry.num_bytes for entry in manifest.shards),
    )


def _to_finish(
    jobs: list[ShardJob], duplicates: list[np.ndarray], folder: WorkFolder
) -> list[_Finish]:
    """The shards that hold anything, under the names that they will have."""
    found: list[_Finish] = []
    for job, left_out in zip(jobs, duplicates, strict=True):
        counts = Counts.of(job.folder.read(job.number))
        if counts.samples > len(left_out):
            target = _finished_folder(folder) / f"{len(found):05d}"
            found.append(_Finish(job, target, left_out, counts.rejects.total() + len(left_out)))
    return found


def _finished_folder(folder: WorkFolder) -> Path:
    return folder.path / "shards"


def _joined(folder: WorkFolder) -> Path:
    return folder.path / "joined"


def _duplicates(jobs: list[ShardJob], workers: Workers) -> list[np.ndarray]:
    """Numbers of the samples of each shard whose key an earlier one of the same input has."""
    runs = [list(run) for _, run in groupby(jobs, key=lambda job: job.inputs[0])]
    return [found for run in workers.map(_duplicates_among, runs) for found in run]


def _duplicates_among(jobs: list[ShardJob]) -> list[np.ndarray]:
    keeps = first_of_each([ShardIndex.read(job.prefix).keys for job in jobs])
    return [np.flatnonzero(~keep) for keep in keeps]


def _names(job: ShardJob, samples: np.ndarray) -> list[tuple[str, str]]:
    if not len(samples):
        return []
    names = read_names(job.prefix)
    return [names[sample] for sample in samples.tolist()]


def _finish(work: _Finish) -> tuple[Manifest, ShardEntry]:
    """Gives the shard its files; what a killed run has done of it stays."""
    target, job = work.target, work.job
    if not manifest_path(target).exists():
        kind, index = KINDS[job.kind], ShardIndex.read(job.prefix)
        keep = np.ones(len(index.keys), bool)
        keep[work.duplicates] = False
        target.parent.mkdir(exist_ok=True)
        source, data = Path(f"{job.prefix}.bin"), Path(f"{target}.bin")
        if keep.all():
            if source.exists():  # else it has its name already
                os.replace(source, data)
        else:
            runs = byte_runs(sample_sizes(index, kind.item_type.itemsize), keep)
            if source.exists():
                with source.open("rb") as reading, open_itself(data, "wb") as writing:
                    copy_runs(reading, writing, runs)
                source.unlink()
            index = index.kept(keep)
        write_tables(kind, [index], target)
        tokenizer: Tokenizer = encoders(job.tokenizer_model)[0]
        Manifest(
            job.kind,
            tokenizer.fingerprint,
            tokenizer.vocab_size,
            len(index.num_parts),
            int(index.num_tokens.sum()),
            int(index.num_images.sum()),
            work.num_rejects,
        ).write(manifest_path(target))
    return shard_entry(str(target), str(target))


def _move_into_place(folder: WorkFolder, prefix: Path) -> Manifest:
    """Gives the shards and their list their names; takes up again what was begun."""
    listed, made = manifest_path(_joined(folder)), _finished_folder(folder)
    if made.exists():
        # The manifest goes first and comes last: without it a dataset does not count as finished.
        manifest_path(prefix).unlink(missing_ok=True)
        remove_folder(shards_folder(prefix), only_writer=True)
        made.rename(shards_folder(prefix))
    if listed.exists():
        os.replace(listed, manifest_path(prefix))
    return Manifest.read(manifest_path(prefix))
