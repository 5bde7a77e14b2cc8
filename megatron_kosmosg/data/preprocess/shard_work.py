"""The work on one shard: read, convert, write a small store of its own beside a rejects file.

What a shard's files hold depends on the shard alone, so the number of workers cannot change them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from megatron_kosmosg.data.manifest import Kind
from megatron_kosmosg.data.preprocess.convert import CONVERTERS
from megatron_kosmosg.data.preprocess.records import BadRecord, Reader, Rejected, Shard
from megatron_kosmosg.data.store import SampleWriter
from megatron_kosmosg.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Counts:
    """What came of some records."""

    samples: int = 0
    tokens: int = 0
    images: int = 0
    output_bytes: int = 0
    """Bytes of the pictures and tokens that were written."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.images + other.images,
            self.output_bytes + other.output_bytes,
            self.rejects + other.rejects,
        )


@dataclass(frozen=True)
class ShardJob:
    """One shard and where its output goes."""

    kind: Kind
    reader: Reader
    shard: Shard
    tokenizer_model: str
    prefix: str
    """Prefix of the shard's own files."""


def work_on_shard(job: ShardJob) -> Counts:
    """Writes PREFIX.bin/.idx, the sentence table and PREFIX.rejects.jsonl; returns the counts."""
    tokenizer = _tokenizer(job.tokenizer_model)
    convert = CONVERTERS[job.kind]
    samples = tokens = images = written = 0
    rejects: Counter[str] = Counter()
    writer = SampleWriter(job.prefix, job.kind)
    with Path(f"{job.prefix}.rejects.jsonl").open("w", encoding="utf-8") as rejects_file:

        def reject(source: str, key: str, rejected: Rejected) -> None:
            rejects[rejected.reason] += 1
            line = {"source": source, "key": key, "reason": rejected.reason}
            if rejected.detail:
                line["detail"] = rejected.detail
            rejects_file.write(json.dumps(line, ensure_ascii=False) + "\n")

        for record in job.reader.read(job.shard):
            if isinstance(record, BadRecord):
                reject(record.source, record.source, record.rejected)
                continue
            try:
                converted = convert(record, tokenizer)
            except Rejected as rejected:
                reject(record.source, record.key, rejected)
                continue
            writer.add(converted.parts, converted.sentences)
            samples += 1
            tokens += converted.num_tokens
            images += converted.num_images
            written += sum(len(part.data) for part in converted.parts)
    writer.finish()
    return Counts(samples, tokens, images, written, rejects)


@lru_cache(maxsize=1)
def _tokenizer(model: str) -> Tokenizer:
    return Tokenizer(model)
