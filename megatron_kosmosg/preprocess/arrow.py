"""The reader of Arrow files, as Hugging Face `datasets` saves them, a record a row; and Zstandard.

Needs pyarrow (the extra `data`), which is imported only when such a file is read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.parquet import BATCH_ROWS, import_pyarrow, python_rows
from megatron_kosmosg.preprocess.record_readers import BadRecord, Shard, ShardSize

if TYPE_CHECKING:
    from pyarrow import RecordBatch


class ArrowReader:
    """Rows of a stream of record batches, mapped; values as the Parquet reader gives them."""

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """Cuts the file into shards, as Reader asks for. `offset` is a record batch; a batch is
        never parted."""
        shards: list[Shard] = []
        start = first = rows = number = 0
        try:
            with _batches(path) as batches:
                for batch in batches:
                    if limit is not None and rows >= limit:
                        break
                    is_full = rows - first + batch.num_rows > size.records
                    if rows > first and is_full:
                        shards.append(Shard(path, start, first, rows - first))
                        start, first = number, rows
                    rows += batch.num_rows
                    number += 1
        except Rejected:
            # Its reader says what is wrong.
            return [*shards, Shard(path, start, first, None if limit is None else 1)]
        rows = rows if limit is None else min(rows, limit)
        return [*shards, Shard(path, start, first, rows - first)] if rows > first else shards

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Records named `file:row`, rows counted from 1."""
        number = shard.first_record
        with _batches(shard.path) as batches:
            for place, batch in enumerate(batches):
                if place < shard.offset:
                    continue
                # Else a changed offset is followed to wherever in memory it points.
                batch.validate(full=True)
                for begin in range(0, batch.num_rows, BATCH_ROWS):
                    for row in python_rows(batch.slice(begin, BATCH_ROWS)):
                        if shard.num_records == number - shard.first_record:
                            return
                        number += 1
                        source = f"{shard.name}:{number}"
                        if isinstance(row, Rejected):
                            yield BadRecord(source, row)
                        else:
                            yield Record(source, row, shard.path.parent)


def open_zstandard(path: Path) -> io.BufferedReader:
    """A file that is compressed with Zstandard, whose library pyarrow's wheels hold; frames that
    stand in it one after the other are read as one."""
    pyarrow = import_pyarrow(path, "files compressed with Zstandard")
    return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))


@contextmanager
def _batches(path: Path) -> Iterator[Iterator[RecordBatch]]:
    """The record batches, mapped. Raises Rejected for a damaged file."""
    pyarrow = import_pyarrow(path, "Arrow files")
    try:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            yield iter(stream)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Rejected("Arrow file is damaged", str(error).splitlines()[0]) from error
