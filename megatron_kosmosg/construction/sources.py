"""Where images come from: a folder, Open Images with its list, or what `--kind caption` reads.

Everything is read through the readers of `kosmosg preprocess` or two more in their manner, so
that what is wrong with an image has one name everywhere.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_kosmosg.data.kinds.caption import CAPTION
from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.preprocess import input_files
from megatron_kosmosg.preprocess.folders import arrow_files, walk
from megatron_kosmosg.preprocess.lines import decode_utf8, line_shards, read_lines
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.record_readers import BadRecord, Reader, Shard, ShardSize
from megatron_kosmosg.preprocess.tar import IMAGE_EXTENSIONS, OTHER_EXTENSIONS

FOLDER, OPEN_IMAGES = "folder", "openimages"
ENDINGS = (*IMAGE_EXTENSIONS, *OTHER_EXTENSIONS)
_ADVICE = "give the folder that holds the images, or what `preprocess --kind caption` reads"
ID_COLUMN, SUBSET_COLUMN, ROTATION_COLUMN = "ImageID", "Subset", "Rotation"


@dataclass(frozen=True)
class Source:
    """A folder or file of images and how it is read: FOLDER, OPEN_IMAGES or a caption format."""

    path: Path
    format: str
    label: str = ""
    """See preprocess.input_files.Input."""

    def reader(self, options: Options) -> Reader:
        """The reader of the source's format."""
        if self.format == FOLDER:
            return FolderReader()
        if self.format == OPEN_IMAGES:
            return OpenImagesReader()
        return input_files.Input(self.path, self.format).reader(options)


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """The sources that names and globs stand for. Raises ValueError, as `find_inputs` does."""
    sources: list[Source] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.exists():
            input_files.refuse_streams(path)
        saved = arrow_files(path) if path.is_dir() else None
        if path.is_dir() and saved is None:
            found = [Source(path, FOLDER)]
        elif path.is_file() and path.suffix.lower() == ".csv":
            found = [Source(path, OPEN_IMAGES)]
        else:
            inputs = input_files.find_inputs([pattern], CAPTION, advice=_ADVICE)
            found = [Source(each.path, each.format) for each in inputs]
        sources += [Source(source.path.resolve(), source.format) for source in found]
    repeated = {source.path for source in sources if sources.count(source) > 1}
    if repeated:
        raise ValueError(f"--input names {min(repeated)} twice")
    folders = [source.path for source in sources if source.format == FOLDER]
    named = input_files.labels([source.path for source in sources], folders)
    return [replace(source, label=named.get(source.path, "")) for source in sources]


def plain_key(name: str) -> str:
    """An image's key: its name without the ending of an image file."""
    stem, dot, ending = name.rpartition(".")
    return stem if dot and ending.lower() in ENDINGS else name


class FolderReader:
    """All images below a folder, in the order of their names; a shard lists its images."""

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """Cuts the folder into shards (Reader.shards): the images are listed here, read later."""
        names = list(image_names(path))[:limit]
        starts = range(0, len(names), size.records)
        parts = [(start, names[start : start + size.records]) for start in starts]
        return [
            Shard(path, start, start, len(part), tuple((name, None) for name in part))
            for start, part in parts
        ]

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Yields records {"key", "image"}."""
        for name, _ in shard.entries:
            fields = {"key": plain_key(name), "image": name}
            yield Record(shard.within(name), fields, shard.path)


class OpenImagesReader:
    """Open Images' `image_ids_and_rotation.csv` beside the images: SUBSET/ID.jpg or ID.jpg.

    `Rotation` says by how many degrees an image is to be turned counterclockwise.
    """

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """Cuts the list into shards, as Reader asks for. Raises ValueError where the first line is
        not that of such a list."""
        with_header = None if limit is None else limit + 1
        shards = line_shards(path, with_header, size.records, size.text_bytes)
        columns = _columns(path)
        if ID_COLUMN not in columns:
            raise ValueError(
                f"--input {path}: a CSV file must be Open Images' list of images with a column "
                f"{ID_COLUMN}; its columns are {', '.join(columns)[:200]}"
            )
        return shards

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Yields records {"key", "image", "rotation"}."""
        columns = _columns(shard.path)
        folder = Path(options.image_root or shard.path.parent)
        for source, line in read_lines(shard):
            if source.endswith(":1"):
                continue
            try:
                yield self._record(source, decode_utf8(line), columns, folder)
            except Rejected as rejected:
                yield BadRecord(source, rejected)

    def _record(self, source: str, line: str, columns: list[str], folder: Path) -> Record:
        values = next(csv.reader([line]))
        if len(values) != len(columns):
            raise Rejected("wrong number of CSV columns", f"{len(values)} for {len(columns)}")
        row = dict(zip(columns, values, strict=True))
        name = f"{row[ID_COLUMN]}.jpg"
        subset = row.get(SUBSET_COLUMN, "")
        if subset and (folder / subset).is_dir():
            name = f"{subset}/{name}"
        rotation = row.get(ROTATION_COLUMN) or "0"
        try:
            turned = float(rotation)
        except ValueError as error:
            raise Rejected("rotation is not a number", rotation) from error
        # Where nobody looked at the image, the list says "nan".
        fields = {"key": row[ID_COLUMN], "image": name, "rotation": turned if turned > 0 else 0.0}
        return Record(source, fields, folder)


def _columns(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        return next(csv.reader(file), [])


def image_names(folder: Path) -> Iterator[str]:
    """The images below a folder by their endings, hidden ones left out, relative to it."""
    for place, folders, names in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            ending = name.rpartition(".")[2].lower()
            if ending in ENDINGS and not name.startswith("."):
                yield (place / name).relative_to(folder).as_posix()
