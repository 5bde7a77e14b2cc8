"""The JSONL reader: one JSON object a line, images named relative to the file's folder."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.foreign_files import parse_json
from megatron_kosmosg.preprocess.lines import decode_utf8, line_shards, opened, read_lines
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.record_readers import BadRecord, Shard, ShardSize

PEEK_BYTES = 4096


class JsonlReader:
    """Blank lines are skipped and counted in line numbers."""

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """Cuts the file into shards at line ends, as Reader asks for."""
        with suppress(Rejected):  # where the file is damaged, its lines are read up to there
            refuse_array(path)
        return line_shards(path, limit, size.records, size.text_bytes)

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Records named `file:line`, lines counted from 1."""
        for source, line in read_lines(shard):
            try:
                yield Record(source, parse_object(line), shard.path.parent)
            except Rejected as rejected:
                yield BadRecord(source, rejected)


def refuse_array(path: Path) -> None:
    """Raises ValueError for a file that is one JSON array and not a record a line."""
    with opened(path) as file:
        start = file.read(PEEK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        raise ValueError(
            f"--input {path} begins like a JSON list; records must stand one JSON object a line: "
            f"jq -c '.[]' {path.name} > {path.stem}.jsonl"
        )


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in some bytes. Raises Rejected for anything else."""
    try:
        fields = parse_json(decode_utf8(data))
    except ValueError as error:
        raise Rejected("not JSON", str(error)) from error
    if not isinstance(fields, dict):
        raise Rejected("not a JSON object")
    return fields
