"""The reader of InstructPix2Pix as it is published: a folder per prompt with its image pairs.

ROOT/[shard-00/]0000123/prompt.json      {"input" (or "caption"), "edit", "output", ...}
ROOT/[shard-00/]0000123/SEED_0.jpg, SEED_1.jpg   before and after, any number of seeds
ROOT/seeds.json                          [[folder, [seed, ...]], ...], if there: what to read
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from megatron_kosmosg.data.kinds.record import Record, Rejected, is_filled
from megatron_kosmosg.foreign_files import MAX_JSON_BYTES, inside, read_file, read_json
from megatron_kosmosg.preprocess.folders import PROMPT_FILE, SEEDS_FILE, walk
from megatron_kosmosg.preprocess.jsonl import parse_object
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.record_readers import BadRecord, FolderEntry, Shard, ShardSize

_TEXTS = {"caption": ("input", "caption"), "instruction": ("edit",), "output": ("output",)}
"""{our name: names in prompt.json}; the first that says anything is taken."""
IMAGE_ENDS = ("_0.jpg", "_1.jpg")


class PromptFolderReader:
    """Records {"key", "caption", "image", "instruction", "target"}, one for each pair."""

    def shards(self, path: Path, limit: int | None, size: ShardSize) -> list[Shard]:
        """Cuts the folder into shards, as Reader asks for. A limit counts prompts."""
        prompts = tuple(islice(_prompts(path), limit))
        step = max(1, size.records // 4)
        parts = ((start, prompts[start : start + step]) for start in range(0, len(prompts), step))
        return [Shard(path, start, start, len(part), part) for start, part in parts]

    def read(self, shard: Shard, options: Options) -> Iterator[Record | BadRecord]:
        """Yields records named `folder/SEED`."""
        for name, seeds in shard.entries:
            try:
                for record in _pairs(shard.path, name, seeds):
                    yield replace(record, source=shard.within(record.source))
            except Rejected as rejected:
                yield BadRecord(shard.within(name), rejected)


def _prompts(root: Path) -> Iterator[FolderEntry]:
    listing = root / SEEDS_FILE
    if listing.is_file():
        try:
            for name, seeds in read_json(listing):
                yield str(name), tuple(str(seed) for seed in seeds)
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{listing} is no list of [folder, [seed, ...]]: {error}") from error
        return
    for folder, subfolders, files in walk(root):
        name = folder.relative_to(root).as_posix()
        if PROMPT_FILE in files:
            subfolders.clear()
            yield name, None
            continue
        if any(file.endswith(IMAGE_ENDS) for file in files):
            yield name, None  # its pairs have no prompt: that is for the rejects file to say
        for file in files:
            if not (folder / file).exists():
                yield (folder / file).relative_to(root).as_posix(), None  # a link to nowhere


def _pairs(root: Path, name: str, seeds: tuple[str, ...] | None) -> Iterator[Record]:
    try:
        folder = inside(root, name)
    except ValueError as error:
        raise Rejected("prompt folder lies outside the input", str(error)) from error
    try:
        prompt = parse_object(read_file(folder / PROMPT_FILE, MAX_JSON_BYTES))
    except OSError as error:
        if not os.path.isdir(folder):  # also False where a name is too long to be one
            raise Rejected("prompt folder is missing", name) from error
        raise Rejected("prompt.json cannot be read", f"{name}: {error.strerror}") from error
    if seeds is None:
        found = (file.name.rpartition("_") for file in folder.iterdir())
        seeds = tuple(sorted({seed for seed, _, end in found if f"_{end}" in IMAGE_ENDS}))
    if not seeds:
        raise Rejected("prompt without images", name)
    texts = {
        field: next(filter(is_filled, (prompt.get(name) for name in names)), None)
        for field, names in _TEXTS.items()
        if any(name in prompt for name in names)
    }
    for seed in seeds:
        fields = {"key": f"{name}/{seed}"} | texts
        fields |= {"image": f"{seed}_0.jpg", "target": f"{seed}_1.jpg"}
        yield Record(f"{name}/{seed}", fields, folder)
