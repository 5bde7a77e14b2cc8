"""What came of all images: counts, reasons, distributions; and the rows of a contact sheet."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from megatron_kosmosg.construction.step_rows import Row, StepFolder
from megatron_kosmosg.data.image_reading import read_image
from megatron_kosmosg.data.samples import EntityImage
from megatron_kosmosg.preprocess.counts import reasons_text

AREA_EDGES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.9)


@dataclass
class StepCounts:
    """How many images reached a step, and what it made of them."""

    name: str
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Images left out, by reason."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Entities left out, by reason."""


@dataclass
class ConstructionReport:
    """All steps, and what the records look like."""

    steps: list[StepCounts]
    caption_words: Counter[int]
    entities: Counter[int]
    """Records by the number of their entities."""
    areas: Counter[str]
    """Entities by the share of the image that they cover."""
    names: Counter[str]
    """Entities by their words."""

    @property
    def num_records(self) -> int:
        return sum(self.entities.values())

    def json(self) -> dict[str, Any]:
        """The report's values for report.json; of the names of entities only the hundred most
        frequent."""
        return {
            "steps": [vars(step) for step in self.steps],
            "caption_words": _sorted(self.caption_words),
            "entities": _sorted(self.entities),
            "areas": _sorted(self.areas),
            "names": dict(self.names.most_common(100)),
        }

    def text(self) -> str:
        """The report as a table for people."""
        rows: list[tuple[str, int | str]] = []
        for step in self.steps:
            rows.append((f"{step.name}: images kept", step.kept))
            rows.append((f"{step.name}: images left out", step.rejected.total()))
            rows += [(f"    {reason}", n) for reason, n in step.rejected.most_common()]
            if step.left_out:
                rows.append((f"{step.name}: entities left out", step.left_out.total()))
                rows += [(f"    {reason}", n) for reason, n in step.left_out.most_common()]
        if self.num_records:
            rows += [
                (f"records with {n} entities", self.entities[n]) for n in sorted(self.entities)
            ]
            rows += [(f"entities covering {share}", n) for share, n in sorted(self.areas.items())]
        if self.caption_words:
            words = sorted(self.caption_words.elements())
            rows.append(("words of a caption, median", words[len(words) // 2]))
        frequent = ", ".join(f"{name} ({n})" for name, n in self.names.most_common(10))
        width = max(len(name) for name, _ in rows)
        table = "\n".join(f"{name:<{width}}  {number:>12,}" for name, number in rows)
        return table + (f"\nmost frequent: {frequent}" if frequent else "")

    def last_line(self) -> str:
        """What was taken and left out, with the reasons of all steps."""
        images = sum((step.rejected for step in self.steps), Counter())
        entities = sum((step.left_out for step in self.steps), Counter())
        parts = [reasons_text("images left out", images)]
        parts += [reasons_text("entities left out", entities)] if entities else []
        return ", ".join([f"{self.num_records:,} records made", *parts])


def make_report(folders: Sequence[StepFolder], num_shards: int) -> ConstructionReport:
    """Makes the report from the rows of finished steps."""
    report = ConstructionReport([], Counter(), Counter(), Counter(), Counter())
    for folder in folders:
        counts = StepCounts(folder.path.name)
        for shard in range(num_shards):
            for row in folder.read(shard):
                _count(row, counts, report)
        report.steps.append(counts)
    return report


def _count(row: Row, counts: StepCounts, report: ConstructionReport) -> None:
    counts.left_out.update(row.get("left_out", ()))
    if "rejected" in row:
        counts.rejected[row["rejected"]] += 1
        return
    counts.kept += 1
    if "record" in row:
        report.entities[len(row["entities"])] += 1
        report.names.update(name.lower() for name in row["entities"])
        report.areas.update(map(_area_name, row["areas"]))
    elif "entities" not in row:
        report.caption_words[len(row["caption"].split())] += 1


def _sorted(counter: Counter[Any]) -> dict[Any, int]:
    return dict(sorted(counter.items()))


def _area_name(area: float) -> str:
    edges = (0.0, *AREA_EDGES)
    i = int(np.searchsorted(AREA_EDGES, area, side="right"))
    above = f"{100 * edges[i]:3.0f} %"
    return f"from {above} of the image" if i < len(AREA_EDGES) else f"from {above}: nearly all"


@dataclass(frozen=True)
class ShownRecord:
    """A built record as people are shown it on the contact sheet."""

    caption: str
    target: Image.Image
    entities: list[tuple[str, Image.Image]]
    """Words, and the image of the entity, its background white where there is a mask."""


def shown_records(records: StepFolder, num_shards: int, count: int) -> Iterator[ShownRecord]:
    """Up to `count` records, taken from all over the shards."""
    full = [s for s in range(num_shards) if records.shard(s).with_suffix(".tar").exists()]
    if not full or count == 0:
        return
    per_shard = -(-count // len(full))
    step = max(1, len(full) * per_shard // count)
    shown = 0
    for shard in full[::step]:
        kept = [row for row in records.read(shard) if "record" in row]
        with tarfile.open(records.shard(shard).with_suffix(".tar")) as tar:
            for row in kept[:: max(1, len(kept) // per_shard)][:per_shard]:
                if shown == count:
                    return
                shown += 1
                yield _shown(tar, row["record"])


def _shown(tar: tarfile.TarFile, key: str) -> ShownRecord:
    def read(name: str) -> bytes:
        member = tar.extractfile(f"{key}.{name}")
        assert member is not None
        return member.read()

    record = json.loads(read("json"))
    entities = []
    for entity in record["entities"]:
        mask = None if entity["mask"] is None else read(entity["mask"])
        shown = read_image(EntityImage(read(entity["image"]), mask))
        entities.append((entity["text"], shown))
    return ShownRecord(record["caption"], read_image(read(record["image"])), entities)
