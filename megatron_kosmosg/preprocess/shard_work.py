"""The work on one shard: read, convert, write it beside a rejects file.

What a shard's files hold depends on the shard alone, so the number of workers cannot change them.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.kinds.kind import Converted
from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.preprocess.convert import RecordConversion
from megatron_kosmosg.preprocess.counts import Counts
from megatron_kosmosg.preprocess.input_files import Input
from megatron_kosmosg.preprocess.layouts import canonical_records
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.record_readers import BadRecord, Shard
from megatron_kosmosg.preprocess.rejects import reject_line, rejects_path
from megatron_kosmosg.preprocess.shard_store import ShardWriter
from megatron_kosmosg.preprocess.text_batches import TextBatches
from megatron_kosmosg.preprocess.word_cache import WordCache
from megatron_kosmosg.shards import ShardFolder

Stretch = tuple[Input, Shard]
"""An input, and the part of it that is read."""


@dataclass(frozen=True)
class ShardJob:
    """What makes one shard, and where its output goes."""

    kind: str
    """A name in data.kinds.KINDS: a kind itself holds functions, which do not travel."""
    stretches: tuple[Stretch, ...]
    """Read one after the other: one, or all of several inputs."""
    options: Options
    tokenizer_model: str
    folder: ShardFolder
    number: int
    has_scopes: bool = False
    """Whether keys of different inputs are told apart in its files: where it may read several."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that the shard is read from."""
        return tuple(source.path for source, _ in self.stretches)

    @property
    def prefix(self) -> str:
        """The prefix of the shard's own files."""
        return str(self.folder.path / f"{self.number:08d}")

    @property
    def rejects_path(self) -> Path:
        """The file of the shard's rejects: one JSON object a line with source, key, reason and
        detail."""
        return rejects_path(self.prefix)


def work_on_shard(job: ShardJob) -> Counts:
    """Writes the shard's files (shard_store.py), its rejects and the counts that it returns.

    A shard that was done before is left as it is.
    """
    if job.folder.is_done(job.number):
        return Counts.of(job.folder.read(job.number))
    started = time.process_time()
    work = _ShardWork(job)
    work.run()
    counts = work.counts(time.process_time() - started)
    job.folder.finish(job.number, vars(counts))
    return counts


class _ShardWork:
    def __init__(self, job: ShardJob) -> None:
        tokenizer, words = encoders(job.tokenizer_model)
        self._job, self._kind = job, KINDS[job.kind]
        self._use = RecordConversion(tokenizer, job.options)
        self._writer = ShardWriter(job.prefix, self._kind)
        self._texts = TextBatches(tokenizer, words, self._writer)
        self._rejects: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()

    def run(self) -> None:
        with self._job.rejects_path.open("w", encoding="utf-8") as self._file:
            for source, shard in self._job.stretches:
                self._writer.scope = self._scope_of(source)
                self._read(source, shard)
                self._flush_texts()
        self._writer.finish()

    def _read(self, source: Input, shard: Shard) -> None:
        options = self._job.options
        try:
            for record in source.reader(options).read(shard, options):
                if isinstance(record, BadRecord):
                    self._reject(record.source, record.source, record.rejected)
                else:
                    self._take(record)
        except Rejected as rejected:
            # The rest of the stretch cannot be read.
            self._reject(shard.name, shard.name, rejected)

    def _scope_of(self, source: Input) -> str:
        """The scope of an input's keys, for inputs in which the same key may stand for different
        records."""
        return str(source.path.absolute()) if self._job.has_scopes else ""

    def counts(self, seconds: float) -> Counts:
        writer, image_check = self._writer, self._use.image_check
        return Counts(
            writer.num_samples,
            writer.num_tokens,
            writer.num_images,
            writer.num_bytes,
            self._rejects,
            self._left_out,
            self._notes,
            image_check.num_verified,
            image_check.seconds,
            seconds,
        )

    def _take(self, record: Record) -> None:
        job = self._job
        if record.note is not None:
            self._notes[record.note] += 1
        try:
            for found in canonical_records(job.kind, record, job.options, self._use.image_check):
                if self._kind.plain_text is not None:
                    self._texts.add(found, self._kind.plain_text(found))
                    if self._texts.is_full:
                        self._flush_texts()
                elif self._kind.convert is not None:
                    self._write(found, self._kind.convert(found, self._use))
        except UnicodeEncodeError as error:
            self._reject(record.source, record.key, Rejected("text is not Unicode", str(error)))
        except Rejected as rejected:
            self._reject(record.source, record.key, _with_members(rejected, record))

    def _write(self, record: Record, converted: Converted) -> None:
        self._left_out.update(record.left_out + converted.left_out)
        self._writer.add(
            converted.parts,
            self._use.sentences(self._kind, converted),
            converted.num_tokens,
            converted.num_images,
            (record.source, record.key if record.has_own_key else None),
        )

    def _flush_texts(self) -> None:
        for record, rejected in self._texts.flush():
            self._reject(record.source, record.key, rejected)

    def _reject(self, source: str, key: str, rejected: Rejected) -> None:
        self._rejects[rejected.reason] += 1
        self._file.write(reject_line(source, key, rejected))


def _with_members(rejected: Rejected, record: Record) -> Rejected:
    """Says of a missing field what the record came with instead."""
    if not record.files or not rejected.reason.startswith("no field "):
        return rejected
    name = rejected.reason.removeprefix("no field ")
    members = ", ".join(record.files)[:200]
    return Rejected(rejected.reason, f"it has {members}; --field {name}=MEMBER names one")


@lru_cache(maxsize=1)
def encoders(model: str) -> tuple[Tokenizer, WordCache]:
    """The tokenizer and the word cache of this process, for all its shards; forked workers inherit
    those of their parent."""
    tokenizer = Tokenizer(model)
    return tokenizer, WordCache(tokenizer)
