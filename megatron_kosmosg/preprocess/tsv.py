"""The TSV reader: rows of the authors' files, whose columns layouts.py gives a meaning.

Images are base64. A row is `{"columns": [...]}`; nothing is quoted or escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.preprocess.lines import decode_utf8, line_shards, read_lines
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.record_readers import BadRecord, Shard, ShardSize


class TsvReader:
    """Reads one record from each line."""

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """Cuts the file into shards at line ends, as Reader asks for."""
        return line_shards(path, limit, size.records, size.image_bytes)

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Records named `file:line`, lines counted from 1."""
        for source, line in read_lines(shard):
            try:
                columns = decode_utf8(line).split("\t")
                yield Record(source, {"columns": columns}, shard.path.parent)
            except Rejected as rejected:
                yield BadRecord(source, rejected)
