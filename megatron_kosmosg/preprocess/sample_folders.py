"""The reader of img2dataset's `files` output: images beside the .txt and .json of the same name.

A sample is the files of a folder that share their names up to the first dot, as in a tar (tar.py),
if one of them is an image, a text or a JSON file.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.foreign_files import read_file
from megatron_kosmosg.preprocess.folders import walk
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.record_readers import BadRecord, FolderEntry, Shard, ShardSize
from megatron_kosmosg.preprocess.tar import IMAGE_EXTENSIONS, OTHER_EXTENSIONS, member_fields

SAMPLE_ENDINGS = (*IMAGE_EXTENSIONS, *OTHER_EXTENSIONS, "txt", "json")
"""Files of the same name are a sample if one of them ends so; others are tables, notes and the
like, which are passed over."""
STATISTICS_ENDING = "_stats"
"""SHARD_stats.json, which img2dataset leaves beside the folder of a shard."""


class SampleFolderReader:
    """Records whose key is the place in the folder, such as 00000/000000000."""

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """Cuts the folder into shards (Reader.shards): the samples are listed here, read later."""
        samples = tuple(islice(_samples(path), limit))
        if not samples:
            raise ValueError(
                f"--input {path} holds no images with a .txt or .json of the same name; of "
                f"tables and archives give the files, such as --input '{path}/**/*.parquet'"
            )
        starts = range(0, len(samples), size.records)
        parts = ((start, samples[start : start + size.records]) for start in starts)
        return [Shard(path, start, start, len(part), part) for start, part in parts]

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Yields a record for each entry of the shard, all of its files read; its key is its place
        in the folder."""
        for name, endings in shard.entries:
            source = shard.within(name)
            try:
                files = {
                    end.lower(): _contents(shard.path / f"{name}.{end}") for end in endings or ()
                }
                yield Record(source, member_fields(name, files), shard.path, files)
            except Rejected as rejected:
                yield BadRecord(source, rejected)


def _samples(root: Path) -> Iterator[FolderEntry]:
    """Yields (place and name up to the dot, endings) of each sample."""
    for place, folders, names in walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        groups: dict[str, list[str]] = {}
        for name in names:
            stem, dot, ending = name.partition(".")
            if stem and dot and not stem.endswith(STATISTICS_ENDING):
                groups.setdefault(stem, []).append(ending)
        for stem, endings in sorted(groups.items()):
            if any(ending.lower() in SAMPLE_ENDINGS for ending in endings):
                yield (place / stem).relative_to(root).as_posix(), tuple(endings)


def _contents(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise Rejected("file cannot be read", f"{path.name}: {error.strerror}") from error
