"""The Parquet reader: one record a row, one shard a row group.

Needs pyarrow (the extra `data`), which is imported only when a Parquet file is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.record_readers import BadRecord, Shard, ShardSize

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

BATCH_ROWS = 64
"""Rows in memory at a time; a row can hold several images."""
BUFFER_BYTES = 1 << 20
"""Of each column that are read at a time."""


class ParquetReader:
    """Rows as Python values; images are bytes, {"bytes", "path"} or file names."""

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """Cuts the file into shards, as Reader asks for. `offset` is the row group."""
        try:
            file = _open(path)
        except Rejected:
            # Its reader says what is wrong.
            return [Shard(path, 0, 0, None if limit is None else 1)]
        shards, first = [], 0
        with file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if limit is not None:
                    rows = min(rows, limit - first)
                if rows > 0:
                    shards.append(Shard(path, group, first, rows))
                first += rows
        return shards

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Records named `file:row`, rows counted from 1."""
        import pyarrow

        assert shard.num_records is None or shard.num_records > 0
        number = shard.first_record
        try:
            with _open(shard.path) as file:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[shard.offset]):
                    for row in python_rows(batch):
                        if shard.num_records == number - shard.first_record:
                            return
                        number += 1
                        source = f"{shard.name}:{number}"
                        if isinstance(row, Rejected):
                            yield BadRecord(source, row)
                        else:
                            yield Record(source, row, shard.path.parent)
        # A name of a column may be damaged, too: pyarrow decodes it when a row is made.
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            detail = f"after row {number}: {str(error).splitlines()[0]}"
            raise Rejected("Parquet file is damaged", detail) from error


def python_rows(batch: RecordBatch) -> list[dict[str, Any] | Rejected]:
    """The rows as Python values; one that holds what Python cannot hold is a Rejected."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in python_rows(batch.slice(i, 1))]
        if isinstance(error, UnicodeDecodeError):
            return [Rejected("invalid UTF-8", str(error))]
        return [Rejected("row cannot be read", str(error))]


def import_pyarrow(path: Path, what: str) -> ModuleType:
    """The module pyarrow. Raises ValueError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: reading {what} needs pyarrow; pip install 'megatron-kosmosg[data]'"
        ) from error
    return pyarrow


def _open(path: Path) -> ParquetFile:
    pyarrow = import_pyarrow(path, "Parquet")
    try:
        # A column of a row group is read a page at a time (1,024 rows as pyarrow writes them), not
        # as a whole and ahead of need: tables that pandas wrote are one row group, however large.
        return pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Rejected("not a Parquet file", str(error).splitlines()[0]) from error
