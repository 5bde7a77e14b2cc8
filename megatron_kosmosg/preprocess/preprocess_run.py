"""A whole preprocessing run: plan shards, work on them, join them, write the manifest.

The output appears under its name only when everything went well, and does not depend on the number
or kind of workers. Every worker process of a run calls `preprocess`; one of them leads.

Long because the job, its steps and what stops it are read together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_kosmosg.config.overwrites import refuse_to_overwrite
from megatron_kosmosg.data.kinds import KINDS, find_kind
from megatron_kosmosg.data.kinds.record import Rejected
from megatron_kosmosg.data.manifest import FORMAT_VERSION, Manifest, manifest_path
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.files import naming_disk
from megatron_kosmosg.preprocess.counts import Counts, summary
from megatron_kosmosg.preprocess.folders import PROMPT_FILE, PROMPTS, SEEDS_FILE
from megatron_kosmosg.preprocess.input_files import Input, find_inputs, limited, shard_size
from megatron_kosmosg.preprocess.join import (
    CopyJob,
    JoinPlan,
    copy_shard,
    is_joined,
    mark_joined,
    move_into_place,
    output_paths,
    plan_join,
    prepare_target,
    write_rejects,
    write_tables,
)
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.record_readers import READING_VERSION, Shard, ShardSize
from megatron_kosmosg.preprocess.rejects import rejects_path
from megatron_kosmosg.preprocess.shard_work import ShardJob, Stretch, encoders, work_on_shard
from megatron_kosmosg.preprocess.sharded import (
    grouped,
    refuse_other_forms,
    shards_folder,
    write_in_shards,
)
from megatron_kosmosg.preprocess.work_folder import WorkFolder
from megatron_kosmosg.preprocess.workers import LocalWorkers, Workers

ShardProgress = Callable[[int, int, Counts], None]
"""Called with (shards done, shards in all, counts so far), first with none."""


class TooManyRejects(ValueError):
    """More records were left out than --max-rejects allows."""


@dataclass(frozen=True)
class PreprocessJob:
    """What a preprocessing run reads, makes and writes."""

    kind: str
    """A name in data.kinds.KINDS."""
    inputs: tuple[str, ...]
    """Files, folders and glob patterns."""
    tokenizer_model: str
    output_prefix: str
    workers: int = 1
    """Processes, where `preprocess` is not given any."""
    max_rejects: int = 100
    """Left-out records beyond which the run fails."""
    limit: int | None = None
    """Records to read of all inputs together; None reads all."""
    format: str = "auto"
    """One of options.FORMATS."""
    options: Options = Options()
    resume: bool = False
    """Go on where a run of the same job was killed."""
    shard_gib: float | None = None
    """The dataset in shards of about so many GiB of input each (sharded.py); None: in one piece."""

    def check(self) -> None:
        """Raises ValueError for values that cannot be meant."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit} must be at least 1")
        if self.max_rejects < 0:
            raise ValueError(f"--max-rejects {self.max_rejects} must not be negative")
        if self.output_prefix.endswith("/"):
            raise ValueError(
                f"--output-prefix {self.output_prefix} must end with a name, such as "
                f"{self.output_prefix}{self.kind}"
            )
        self.options.check(find_kind(self.kind))


@dataclass(frozen=True)
class PreprocessReport:
    """What a preprocessing run did."""

    counts: Counts
    seconds: float


def preprocess(
    job: PreprocessJob, progress: ShardProgress, workers: Workers | None = None
) -> PreprocessReport:
    """Writes the dataset `job.output_prefix`, replacing an older one.

    Args:
        job: what is read, made and written.
        progress: shows how far the work is.
        workers: who does it; None chooses processes of this machine or ranks of an MPI job.

    Raises:
        ValueError: the input cannot be used.
        TooManyRejects: more records were left out than the job allows. In both cases nothing of
            that name changes but PREFIX.rejects.jsonl.
    """
    started = time.perf_counter()
    workers = workers or LocalWorkers(job.workers)
    job.check()
    tokenizer, _ = encoders(job.tokenizer_model)
    prefix = Path(job.output_prefix)
    folder = WorkFolder(prefix)
    inputs = workers.lead(lambda: find_inputs(job.inputs, KINDS[job.kind], job.format))
    workers.lead(lambda: _refuse_to_overwrite(job, inputs, folder))
    groups = _plan(job, inputs, workers)
    workers.lead(lambda: folder.open(_identity(job, inputs, tokenizer), job.resume))
    try:
        jobs = [
            ShardJob(
                *(job.kind, stretches, job.options, job.tokenizer_model),
                *(folder.shards, number),
                has_scopes=job.shard_gib is not None,
            )
            for number, stretches in enumerate(groups)
        ]
        with naming_disk(folder.path):
            counts = _work(job, jobs, folder, progress, workers)
            if job.shard_gib is None:
                counts = _join(job, jobs, folder, counts, tokenizer, workers)
            else:
                check = partial(_check, job, folder)
                counts = write_in_shards(prefix, jobs, folder, counts, check, workers)
        workers.lead(folder.remove)
    finally:
        folder.close()
    return PreprocessReport(counts, time.perf_counter() - started)


def _refuse_to_overwrite(job: PreprocessJob, inputs: list[Input], folder: WorkFolder) -> None:
    prefix = Path(job.output_prefix)
    # A listing is read, too, besides the files that it names.
    reads = [Path(job.tokenizer_model), *map(Path, job.inputs), *(source.path for source in inputs)]
    for source in inputs:
        if source.format == PROMPTS:
            reads += [source.path / SEEDS_FILE, prefix.parent / PROMPT_FILE]
    written = [*output_paths(prefix), shards_folder(prefix), folder.path]
    refuse_to_overwrite(written, reads, "--output-prefix")
    refuse_other_forms(prefix, job.shard_gib is not None, folder)


def _identity(job: PreprocessJob, inputs: list[Input], tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that the bytes of the output depend on."""
    files = [(str(source.path.absolute()), source.format, source.path.stat()) for source in inputs]
    return {
        "kind": job.kind,
        "input files": [[name, form, stat.st_size, stat.st_mtime_ns] for name, form, stat in files],
        "tokenizer model": tokenizer.fingerprint,
        "limit": job.limit,
        "options": asdict(job.options),
        "format version": [FORMAT_VERSION, READING_VERSION],
        **({} if job.shard_gib is None else {"--shard-gib": job.shard_gib}),
    }


def _plan(job: PreprocessJob, inputs: list[Input], workers: Workers) -> list[tuple[Stretch, ...]]:
    """The stretches of the input that each shard is made of."""
    size = workers.lead(lambda: shard_size(inputs))
    cut = partial(_shards, options=job.options, limit=job.limit, size=size)
    per_input = limited(workers.map(cut, inputs), job.limit)
    shards = [
        (source, shard) for source, found in zip(inputs, per_input, strict=True) for shard in found
    ]
    if not shards:
        raise ValueError(f"--input {' '.join(job.inputs)}: no records")
    if job.shard_gib is None:
        return [(stretch,) for stretch in shards]
    most_bytes = job.shard_gib * 2**30
    return workers.lead(lambda: grouped(shards, size, most_bytes))


def _shards(source: Input, options: Options, limit: int | None, size: ShardSize) -> list[Shard]:
    try:
        shards = source.reader(options).shards(source.path, limit, size)
    except Rejected:
        # Damaged: the shard's reader meets the same place and says so in the rejects file.
        shards = [Shard(source.path, 0, 0, limit)]
    return [replace(shard, label=source.label) for shard in shards]


def _work(
    job: PreprocessJob,
    jobs: list[ShardJob],
    folder: WorkFolder,
    progress: ShardProgress,
    workers: Workers,
) -> Counts:
    counts = Counts()

    def add(done: int, more: Counts) -> None:
        nonlocal counts
        counts += more
        progress(done, len(jobs), counts)
        _check_rejects(job, counts, folder)

    progress(0, len(jobs), counts)
    try:
        found = workers.map(work_on_shard, jobs, add)
    except TooManyRejects:
        workers.lead(lambda: write_rejects(jobs, [], rejects_path(job.output_prefix)))
        raise
    return sum(found, Counts())


def _join(
    job: PreprocessJob,
    jobs: list[ShardJob],
    folder: WorkFolder,
    worked: Counts,
    tokenizer: Tokenizer,
    workers: Workers,
) -> Counts:
    joined = folder.path / "joined"
    plans: list[JoinPlan] = []
    """One, in the leader: the arrays of all samples need not be everywhere."""

    def plan() -> tuple[list[CopyJob], Counts]:
        plans.append(plan_join(KINDS[job.kind], jobs, joined))
        counts = plans[0].counts(worked)
        write_rejects(jobs, plans[0].duplicates, rejects_path(job.output_prefix))
        _check(job, folder, counts)
        if not is_joined(joined):
            prepare_target(plans[0], joined)
        return plans[0].copies, counts

    def finish() -> None:
        if not is_joined(joined):
            write_tables(plans[0].kind, plans[0].shards, joined)
            manifest = Manifest(
                job.kind,
                tokenizer.fingerprint,
                tokenizer.vocab_size,
                counts.samples,
                counts.tokens,
                counts.images,
                counts.rejects.total(),
            )
            manifest.write(manifest_path(joined))
            mark_joined(joined)
        move_into_place(joined, Path(job.output_prefix))

    copies, counts = workers.lead(plan)
    workers.map(copy_shard, copies)
    workers.lead(finish)
    return counts


def _check(job: PreprocessJob, folder: WorkFolder, counts: Counts) -> None:
    """Raises TooManyRejects, and ValueError where there is nothing to write."""
    _check_rejects(job, counts, folder)
    if counts.samples == 0:
        folder.remove()
        raise ValueError(f"no usable record in {', '.join(job.inputs)}\n{summary(counts)}")


def _check_rejects(job: PreprocessJob, counts: Counts, folder: WorkFolder) -> None:
    num_rejects = counts.rejects.total()
    if num_rejects > job.max_rejects:
        raise TooManyRejects(
            f"{num_rejects} records rejected, --max-rejects allows {job.max_rejects}; see "
            f"{rejects_path(job.output_prefix)}. No dataset was written. What is done stays in "
            f"{folder.path}: the same command with a larger --max-rejects and --resume goes on\n"
            f"{summary(counts)}"
        )
