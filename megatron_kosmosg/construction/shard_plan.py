"""Which images make a shard. Written once into the output folder, so that every rank and every
later run, with whatever number of ranks, works on the same shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_kosmosg.construction.sources import FOLDER, Source, find_sources, plain_key
from megatron_kosmosg.construction.step_rows import StepFolder
from megatron_kosmosg.data.kinds.caption import CAPTION
from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.files import exclusive, write_json
from megatron_kosmosg.preprocess.image_check import ImageCheck
from megatron_kosmosg.preprocess.layouts import canonical_records
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.record_readers import BadRecord, Shard, ShardSize

NO_TEXT_LIMIT, SHARD_BYTES = 1 << 62, 1 << 30
COUNT_FILE = "count.json"


@dataclass(frozen=True)
class PlannedRecord:
    """An image that is still encoded, with what came with it."""

    key: str
    record: Record | Rejected
    """Fields `image` and, where the input has them, `caption` and `rotation`."""


class BuildPlan:
    """The images of each shard of an output folder."""

    def __init__(self, output: Path, num_shards: int, options: Options) -> None:
        self.output, self.num_shards = output, num_shards
        self._options = options
        self._images = ImageCheck(options)

    def images(self, number: int) -> Iterator[PlannedRecord]:
        """The images of a shard; keys are unique in it."""
        stored = json.loads(_shard_file(self.output, number).read_text(encoding="utf-8"))
        source = Source(Path(stored["path"]), stored["format"])
        # An output that an earlier version began has no labels.
        label = stored.get("label", "")
        shard = Shard(
            source.path,
            stored["offset"],
            stored["first_record"],
            stored["num_records"],
            tuple((name, None) for name in stored["names"]),
            label,
        )
        seen: set[str] = set()
        for found in source.reader(self._options).read(shard, self._options):
            planned = self._canonical(found)
            if planned.key in seen and source.format == FOLDER:
                # 1.png beside 1.jpg: a file's whole name is its own.
                planned = replace(planned, key=_file_name(found, planned.key))
            if planned.key in seen:
                unique = f"{planned.key} ({found.source})"
                planned = PlannedRecord(unique, Rejected("duplicate key", planned.key))
            seen.add(planned.key)
            yield planned

    def _canonical(self, found: Record | BadRecord) -> PlannedRecord:
        if isinstance(found, BadRecord):
            return PlannedRecord(found.source, found.rejected)
        try:
            (record,) = canonical_records(CAPTION.name, found, self._options, self._images)
        except Rejected as rejected:
            return PlannedRecord(plain_key(found.key), rejected)
        return PlannedRecord(plain_key(record.key), record)


def make_build_plan(
    output: Path, inputs: list[str], shard_size: int, limit: int | None, options: Options
) -> BuildPlan:
    """The plan in `output`, made by the first process that asks.

    Raises ValueError for inputs without images and for an output that was begun with others.
    """
    folder = StepFolder(output, "plan")
    sources = find_sources(inputs)
    folder.begin(
        {
            "inputs": [f"{source.path} ({source.format})" for source in sources],
            "shard_size": shard_size,
            "limit": limit,
        }
    )
    count = folder.path / COUNT_FILE
    with exclusive(folder.path / "lock"):
        if not count.exists():
            write_json(count, _write_shards(output, sources, shard_size, limit, options))
    return BuildPlan(output, json.loads(count.read_text(encoding="utf-8")), options)


def _write_shards(
    output: Path, sources: list[Source], shard_size: int, limit: int | None, options: Options
) -> int:
    size = ShardSize(shard_size, NO_TEXT_LIMIT, SHARD_BYTES)
    number, left = 0, limit
    for source in sources:
        if left == 0:
            break
        shards = source.reader(options).shards(source.path, left, size)
        if not shards:
            raise ValueError(f"--input {source.path} holds no images")
        for shard in shards:
            write_json(_shard_file(output, number), _stored(source, shard))
            number += 1
        if left is not None:
            left = max(0, left - sum(shard.num_records or 0 for shard in shards))
    return number


def _stored(source: Source, shard: Shard) -> dict[str, Any]:
    return {
        "path": str(source.path),
        "format": source.format,
        "offset": shard.offset,
        "first_record": shard.first_record,
        "num_records": shard.num_records,
        "names": [name for name, _ in shard.entries],
        "label": source.label,
    }


def _file_name(found: Record | BadRecord, key: str) -> str:
    return str(found.fields["image"]) if isinstance(found, Record) else key


def _shard_file(output: Path, number: int) -> Path:
    return output / "plan" / f"{number:06d}.json"
