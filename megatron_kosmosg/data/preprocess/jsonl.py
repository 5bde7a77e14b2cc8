"""The JSONL reader: one JSON object a line, pictures named relative to the file's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_kosmosg.data.preprocess.records import BadRecord, Record, Rejected, Shard

MAX_RECORDS, MAX_BYTES = 1000, 4 << 20
"""A shard ends at whichever comes first."""


class JsonlReader:
    """Blank lines are skipped and counted in line numbers."""

    def shards(self, path: Path, limit: int | None) -> list[Shard]:
        """Shards of at most MAX_RECORDS lines or about MAX_BYTES."""
        shards: list[Shard] = []
        offset = start = first = lines = 0
        with path.open("rb") as file:
            for line in file:
                if limit is not None and lines == limit:
                    break
                if lines - first == MAX_RECORDS or offset - start >= MAX_BYTES:
                    shards.append(Shard(path, start, first, lines - first))
                    start, first = offset, lines
                offset += len(line)
                lines += 1
        if lines > first:
            shards.append(Shard(path, start, first, lines - first))
        return shards

    def read(self, shard: Shard) -> Iterator[Record | BadRecord]:
        """Records named `file:line`, lines counted from 1."""
        with shard.path.open("rb") as file:
            file.seek(shard.offset)
            for number in range(shard.first_record + 1, shard.first_record + 1 + shard.num_records):
                line = file.readline()
                source = f"{shard.path.name}:{number}"
                if not line.strip():
                    continue
                try:
                    yield Record(source, _parse(line), shard.path.parent)
                except Rejected as rejected:
                    yield BadRecord(source, rejected)


def _parse(line: bytes) -> dict[str, object]:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Rejected("invalid UTF-8", str(error)) from error
    except json.JSONDecodeError as error:
        raise Rejected("not JSON", str(error)) from error
    if not isinstance(fields, dict):
        raise Rejected("not a JSON object")
    return fields
