"""A whole preprocessing run: plan shards, work on them in processes, join them, write the manifest.

The output appears under its name only when everything went well, and does not depend on the number
of workers.
"""

from __future__ import annotations

import glob
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmosg.data.manifest import Kind, Manifest, manifest_path
from megatron_kosmosg.data.preprocess.jsonl import JsonlReader
from megatron_kosmosg.data.preprocess.shard_work import Counts, ShardJob, work_on_shard
from megatron_kosmosg.data.store import SampleWriter, sentence_paths
from megatron_kosmosg.data.tokenizer import Tokenizer

Progress = Callable[[int, int, Counts], None]
"""Called with (shards done, shards in all, counts so far)."""


@dataclass(frozen=True)
class PreprocessJob:
    """What to do."""

    kind: Kind
    inputs: tuple[str, ...]
    """Files and glob patterns."""
    tokenizer_model: str
    output_prefix: str
    workers: int = 1
    max_rejects: int = 100
    """Left-out records beyond which the run fails."""
    limit: int | None = None
    """Records to read of all inputs together; None reads all."""


@dataclass(frozen=True)
class Report:
    """What was done."""

    counts: Counts
    seconds: float


def preprocess(job: PreprocessJob, progress: Progress) -> Report:
    """Writes the dataset `job.output_prefix`, replacing an older one.

    Raises ValueError for empty input or too many rejects; then only PREFIX.rejects.jsonl is new.
    """
    started = time.perf_counter()
    tokenizer = Tokenizer(job.tokenizer_model)
    prefix = Path(job.output_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    files = find_inputs(job.inputs)
    with tempfile.TemporaryDirectory(prefix=f".{prefix.name}.", dir=prefix.parent) as scratch:
        jobs = _plan(job, files, Path(scratch))
        counts = _work(job, jobs, progress)
        _write_rejects(jobs, prefix)
        num_rejects = counts.rejects.total()
        if num_rejects > job.max_rejects:
            raise ValueError(
                f"{num_rejects} records rejected, --max-rejects allows {job.max_rejects}; nothing "
                f"was written but {prefix}.rejects.jsonl\n{summary(counts)}"
            )
        if counts.samples == 0:
            raise ValueError(f"no usable record in {', '.join(job.inputs)}\n{summary(counts)}")
        joined = Path(scratch) / "joined"
        _join(job.kind, [shard_job.prefix for shard_job in jobs], joined)
        manifest = Manifest(
            job.kind,
            tokenizer.fingerprint,
            tokenizer.vocab_size,
            counts.samples,
            counts.tokens,
            counts.images,
            num_rejects,
        )
        manifest.write(manifest_path(joined))
        _move_into_place(joined, prefix)
    return Report(counts, time.perf_counter() - started)


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that the names and globs stand for, globs sorted. Raises ValueError if none."""
    files: list[Path] = []
    for pattern in patterns:
        found = [Path(pattern)] if Path(pattern).is_file() else []
        found = found or [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        found = [path for path in found if path.is_file()]
        if not found:
            raise ValueError(f"--input {pattern} matches no file")
        files.extend(found)
    return files


def summary(counts: Counts) -> str:
    """A small table of what was kept and what was left out, by reason."""
    rows = [
        ("samples", counts.samples),
        ("text tokens", counts.tokens),
        ("images", counts.images),
        ("bytes written", counts.output_bytes),
        ("rejected", counts.rejects.total()),
    ]
    rows += [(f"  {reason}", number) for reason, number in sorted(counts.rejects.items())]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {number:>15,}" for name, number in rows)


def _plan(job: PreprocessJob, files: list[Path], scratch: Path) -> list[ShardJob]:
    reader = JsonlReader()
    shards, left = [], job.limit
    for path in files:
        found = reader.shards(path, left)
        shards.extend(found)
        if left is not None:
            left -= sum(shard.num_records for shard in found)
    if not shards:
        raise ValueError(f"--input {' '.join(job.inputs)}: no records")
    return [
        ShardJob(job.kind, reader, shard, job.tokenizer_model, str(scratch / f"{i:08d}"))
        for i, shard in enumerate(shards)
    ]


def _work(job: PreprocessJob, jobs: list[ShardJob], progress: Progress) -> Counts:
    counts = Counts()

    def add(done: int, more: Counts) -> None:
        nonlocal counts
        counts += more
        progress(done, len(jobs), counts)

    if job.workers <= 1:
        for done, shard_job in enumerate(jobs, 1):
            add(done, work_on_shard(shard_job))
        return counts
    # fork: the workers start with everything imported.
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(min(job.workers, len(jobs)), context) as pool:
            for done, more in enumerate(pool.map(work_on_shard, jobs), 1):
                add(done, more)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process ended unexpectedly (killed, perhaps out of memory); nothing was "
            "written; try fewer --workers"
        ) from error
    return counts


def _write_rejects(jobs: list[ShardJob], prefix: Path) -> None:
    joined = Path(f"{prefix}.rejects.jsonl")
    temporary = Path(f"{joined}.tmp")
    with temporary.open("wb") as output:
        for shard_job in jobs:
            output.write(Path(f"{shard_job.prefix}.rejects.jsonl").read_bytes())
    temporary.replace(joined)


def _join(kind: Kind, prefixes: list[str], joined: Path) -> None:
    writer = SampleWriter(joined, kind)
    for prefix in prefixes:
        writer.add_store(prefix)
        for path in (f"{prefix}.bin", f"{prefix}.idx"):
            Path(path).unlink()
    writer.finish()


def _move_into_place(joined: Path, prefix: Path) -> None:
    # The manifest goes first and comes last: a dataset without it is not taken for a finished one.
    manifest_path(prefix).unlink(missing_ok=True)
    names = [(f"{joined}{end}", f"{prefix}{end}") for end in (".bin", ".idx")]
    names += list(zip(sentence_paths(joined), sentence_paths(prefix), strict=True))
    names.append((str(manifest_path(joined)), str(manifest_path(prefix))))
    for source, target in names:
        shutil.move(source, target)
