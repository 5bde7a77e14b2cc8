"""The toy world as ordinary files: PNG and JPEG images, and one JSONL file per kind and split.

Training records show no held-out combination; held-out records show only such, except for what an
edit leads to. A held-out record also states the truth: `scene` (its target image, else its
image) or `scenes` (its images in order). `heldout/prompts.jsonl` asks for the first of them in
the form `kosmosg generate` reads: the entities as images only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kosmosg.files import new_folder
from megatron_kosmosg.progress import ProgressCallback
from megatron_kosmosg.toy.scene_files import ImageFiles
from megatron_kosmosg.toy.toy_records import WRITERS

SPLITS = ("train", "heldout")
MANIFEST = "world.json"
VERSION = 3
SHARES = {"text": 0.5, "caption": 3.0, "interleaved": 0.5, "compositional": 1.5, "edit": 0.5}
"""Training records of each kind, relative to `size`."""
PROMPTS_FILE, NUM_PROMPTS = "prompts.jsonl", 8
HELDOUT_SHARE, MIN_HELDOUT, MAX_HELDOUT = 0.1, 16, 256


@dataclass(frozen=True)
class World:
    """The settings that decide the files; the same values give the same bytes."""

    size: int
    seed: int
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: a world needs at least one scene")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")

    def count(self, split: str, kind: str) -> int:
        """Number of records in SPLIT/KIND.jsonl."""
        if split == "train":
            return max(1, round(self.size * SHARES[kind]))
        return min(MAX_HELDOUT, max(MIN_HELDOUT, round(self.size * HELDOUT_SHARE)))


def is_complete(folder: Path, world: World) -> bool:
    """Whether `folder` holds exactly this world, finished."""
    manifest = folder / MANIFEST
    return manifest.is_file() and json.loads(manifest.read_text()) == asdict(world)


def write_world(folder: Path, world: World, report: ProgressCallback) -> None:
    """Writes the world beside `folder` and renames it; an older world there is replaced. `report`
    is told of records. Raises ValueError when `folder` holds anything else."""
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that are not a toy world; name another folder")
    with new_folder(folder, only_writer=True, replaces=True) as temporary:
        tables = [(split, kind) for split in SPLITS for kind in WRITERS]
        total = sum(world.count(*table) for table in tables)
        done = 0
        report(done, total)
        for split, kind in tables:
            records = temporary / split
            records.mkdir(parents=True, exist_ok=True)
            images = ImageFiles(records, kind)
            with (records / f"{kind}.jsonl").open("w") as out:
                for i in range(world.count(split, kind)):
                    out.write(json.dumps(_record(world, split, kind, i, images)) + "\n")
                    done += 1
                    report(done, total)
            images.finish()
        _write_prompts(temporary / "heldout")
        (temporary / MANIFEST).write_text(json.dumps(asdict(world)) + "\n")


def _write_prompts(heldout: Path) -> None:
    records = (heldout / "compositional.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    prompts = [prompt_record(json.loads(line)) for line in records]
    (heldout / PROMPTS_FILE).write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def prompt_record(record: dict[str, Any]) -> dict[str, Any]:
    """A compositional record as a prompt: its caption, each entity's words replaced by its
    image."""
    content, end = [], 0
    for entity in record["entities"]:
        start, next_end = entity["span"]
        content += [{"text": record["caption"][end:start].strip()}, {"image": entity["image"]}]
        end = next_end
    content.append({"text": record["caption"][end:].strip()})
    return {"id": record["key"], "content": [part for part in content if part.get("text") != ""]}


def _record(world: World, split: str, kind: str, index: int, images: ImageFiles) -> dict[str, Any]:
    place = (world.seed, SPLITS.index(split), tuple(WRITERS).index(kind), index)
    images.begin(index)
    record, truth = WRITERS[kind](np.random.default_rng(place), split == "heldout", images)
    record = {"key": f"{kind}-{index:06d}"} | record
    return record | truth if split == "heldout" else record
