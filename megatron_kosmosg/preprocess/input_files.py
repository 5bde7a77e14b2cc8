"""Which files are read, in which format, and in which shards: a function of the input alone.

Long because everything that --input may stand for is told apart here.
"""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_kosmosg.data.kinds.kind import SampleKind
from megatron_kosmosg.foreign_files import OutsideFolder, inside, read_json
from megatron_kosmosg.preprocess.arrow import ArrowReader
from megatron_kosmosg.preprocess.folders import (
    PROMPTS,
    SAMPLES,
    arrow_files,
    expand_glob,
    folder_format,
)
from megatron_kosmosg.preprocess.jsonl import JsonlReader, refuse_array
from megatron_kosmosg.preprocess.lines import PACKED_ENDINGS
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.parquet import ParquetReader
from megatron_kosmosg.preprocess.prompt_folders import PromptFolderReader
from megatron_kosmosg.preprocess.record_readers import Reader, Shard, ShardSize
from megatron_kosmosg.preprocess.rejects import is_product
from megatron_kosmosg.preprocess.sample_folders import SampleFolderReader
from megatron_kosmosg.preprocess.tar import TarReader
from megatron_kosmosg.preprocess.tsv import TsvReader
from megatron_kosmosg.preprocess.txt import TxtReader

_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".tar": "tar",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tsv": "tsv",
    ".txt": "txt",
}
_PACKED = ("jsonl", "tsv", "txt")
LISTING_BYTES = 64 << 10
"""Of the start of a JSON file, in which a listing says `source` if it is one."""
MAX_RECORDS, MAX_TEXT_BYTES, MAX_IMAGE_BYTES = 1000, 4 << 20, 64 << 20
LARGE_INPUT = 16 << 30
"""Bytes of input; beyond it shards grow, so that their number stays in the thousands."""


@dataclass(frozen=True)
class Input:
    """A file or folder and the format it is read in."""

    path: Path
    format: str
    label: str = ""
    """What its records call it, where its name alone does not tell it from another input."""

    def reader(self, options: Options) -> Reader:
        """The reader of the input's format."""
        if self.format == "txt":
            return TxtReader(options.text_documents)
        return {
            "jsonl": JsonlReader,
            "tar": TarReader,
            "parquet": ParquetReader,
            "arrow": ArrowReader,
            "tsv": TsvReader,
            PROMPTS: PromptFolderReader,
            SAMPLES: SampleFolderReader,
        }[self.format]()


def find_inputs(
    patterns: Sequence[str],
    kind: SampleKind,
    requested: str = "auto",
    advice: str = "give --format",
) -> list[Input]:
    """What the names and globs stand for, globs sorted and without our own products, listings
    opened.

    advice: what the command has for a file whose name does not tell its format.

    Raises ValueError for a pattern that matches nothing, an input named twice and a format that
    cannot be told or does not go with `kind`.
    """
    inputs: list[Input] = []
    for pattern in patterns:
        paths = [Path(pattern)] if Path(pattern).exists() else []
        paths = paths or _matches(pattern)
        for path in paths:
            inputs.extend(_open(path, kind, requested, advice))
    seen: dict[str, Path] = {}
    for source in inputs:
        if source.format not in kind.formats:
            raise ValueError(
                f"--input {source.path}: --kind {kind.name} is not read from {source.format}; "
                f"it is read from {', '.join(kind.formats)}"
            )
        other = seen.setdefault(os.path.realpath(source.path), source.path)
        if other is not source.path:
            link = "" if other == source.path else f"; {other} is the same"
            raise ValueError(f"--input names {source.path} twice{link}")
    folders = [source.path for source in inputs if source.format in (PROMPTS, SAMPLES)]
    named = labels([source.path for source in inputs], folders)
    return [replace(source, label=named.get(source.path, "")) for source in inputs]


def shard_size(inputs: Iterable[Input]) -> ShardSize:
    """How large the shards of these inputs are."""
    total = sum(source.path.stat().st_size for source in inputs)
    scale = -(-total // LARGE_INPUT) or 1
    return ShardSize(MAX_RECORDS * scale, MAX_TEXT_BYTES * scale, MAX_IMAGE_BYTES * scale)


def limited(per_input: Sequence[list[Shard]], limit: int | None) -> list[list[Shard]]:
    """The shards of each input, whose records were counted, cut at `limit` records in all."""
    if limit is None:
        return list(per_input)
    kept, left = [], limit
    for shards in per_input:
        taken = []
        for shard in shards:
            assert shard.num_records is not None
            if left > 0:
                taken.append(_shortened(shard, left))
                left -= shard.num_records
        kept.append(taken)
    return kept


def _shortened(shard: Shard, records: int) -> Shard:
    assert shard.num_records is not None
    records = min(records, shard.num_records)
    return replace(shard, num_records=records, entries=shard.entries[:records])


def refuse_streams(path: Path) -> None:
    """Raises ValueError for what can be read only once, or nowhere but in this process."""
    mode = path.stat().st_mode
    has_own_name = not str(path).startswith(("/dev/stdin", "/dev/fd/", "/proc/"))
    if has_own_name and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return
    what = "a pipe (FIFO)" if stat.S_ISFIFO(mode) else "an open file or device"
    raise ValueError(
        f"--input {path} is {what}, not a regular file under its own name; it is read at several "
        "places by several processes: write it to a file first"
    )


def labels(paths: Sequence[Path], folders: Sequence[Path]) -> dict[Path, str]:
    """What records call those of `paths` that their names alone do not tell apart: as much of their
    paths as does. Of several `folders` among them, whose records are named by their places in them,
    the name at least."""
    by_name: dict[str, list[Path]] = {}
    for path in paths:
        by_name.setdefault(path.name, []).append(path)
    found = {path: path.name for path in folders if len(folders) > 1}
    for alike in by_name.values():
        if len(alike) > 1:
            found |= dict(zip(alike, _tails(alike), strict=True))
    return found


def _tails(paths: list[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [path.absolute().parts for path in paths]
    longest = max(map(len, parts))
    tails = ([each[-number:] for each in parts] for number in range(2, longest + 1))
    apart = next((tail for tail in tails if len(set(tail)) == len(tail)), parts)
    return ["/".join(tail) for tail in apart]


def _open(path: Path, kind: SampleKind, requested: str, advice: str) -> list[Input]:
    """The inputs that a name stands for: a file, a folder, or the files that a folder or a listing
    names."""
    refuse_streams(path)
    if path.is_dir():
        saved = arrow_files(path)
        if saved is not None:
            return [Input(file, "arrow") for file in saved]
        return [Input(path, folder_format(path, kind))]
    return _open_listing(path, _format(path, requested, advice))


def _matches(pattern: str) -> list[Path]:
    """What a glob stands for, without what preprocessing itself wrote: whoever wants that read
    names it."""
    matches = [Path(name) for name in sorted(set(expand_glob(pattern)))]
    found = [path for path in matches if path.is_dir() or not is_product(path)]
    if not found:
        products = f" but {matches[0]}, which preprocessing wrote" if matches else ""
        stream = "; standard input is not read" if pattern == "-" else ""
        raise ValueError(f"--input {pattern} matches no file{products}{stream}")
    return found


def _format(path: Path, requested: str, advice: str) -> str:
    if requested != "auto":
        return requested
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_packed = bool(suffixes) and suffixes[-1] in PACKED_ENDINGS
    if is_packed:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _ENDINGS:
        raise ValueError(f"--input {path}: the name does not tell the format; {advice}")
    found = _ENDINGS[suffixes[-1]]
    if is_packed and found not in _PACKED:
        raise ValueError(
            f"--input {path}: {found} is not read from compressed files, which cannot be entered "
            "in the middle; unpack it first"
        )
    return found


def _open_listing(path: Path, format_: str) -> list[Input]:
    """The TSV files that the authors' json/train.json lists; any other file as it is.

    They lie in data/ beside json/, or (LAION) directly in the folder that holds json/.
    """
    if path.suffix.lower() != ".json" or format_ not in ("jsonl", "tsv") or not _is_list(path):
        return [Input(path, format_)]
    entries = _list_of_objects(path)
    names = [name for entry in entries for name in entry.get("source", [])]
    if not names:
        refuse_array(path)
    if len({str(entry.get("weight")) for entry in entries}) > 1:
        raise ValueError(
            f"--input {path} gives its parts different weights; make a dataset of each part (name "
            "its TSV files in --input) and set the weights in data.blend"
        )
    root = path.parent.parent
    folder = root / "data" if (root / "data").is_dir() else root
    files = [_listed(folder, name, path) for name in names]
    return [Input(file, "tsv") for file in files]


def _listed(folder: Path, name: Any, listing: Path) -> Path:
    with suppress(OutsideFolder):
        file = inside(folder, str(name))
        if file.is_file():
            return file
    raise ValueError(f"--input {listing} lists {name}, which is not in {folder}")


def _list_of_objects(path: Path) -> list[dict[str, Any]]:
    try:
        entries = read_json(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"--input {path} begins like a JSON list and is none: {error}") from error
    if not all(isinstance(entry, dict) for entry in entries):
        refuse_array(path)
    return entries


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(LISTING_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    return start.startswith(b"[") and b'"source"' in start
