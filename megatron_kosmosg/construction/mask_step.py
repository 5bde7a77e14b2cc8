"""Step 3: where each entity is in its image, from a segmenter or from files; then the records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from megatron_kosmosg.construction.annotations import Annotations
from megatron_kosmosg.construction.on_demand import OnDemand
from megatron_kosmosg.construction.read_ahead import in_batches, read_ahead
from megatron_kosmosg.construction.record_tars import (
    CutEntity,
    ImageFormat,
    RecordWriter,
    record_file,
)
from megatron_kosmosg.construction.regions import entity_region, square_around
from megatron_kosmosg.construction.shard_plan import BuildPlan, PlannedRecord
from megatron_kosmosg.construction.square_images import SquareImages
from megatron_kosmosg.construction.step_rows import Row, StepFolder, rejected_row
from megatron_kosmosg.data.kinds.record import Record, Rejected, list_field

Named = tuple[Image.Image, str]
Ready = tuple[PlannedRecord, Row, Image.Image]
HALF = 127
"""Grey value above which a pixel of a mask file counts for the square around it."""


class Segmenter(Protocol):
    """A model that finds named things in images."""

    def __call__(self, named: Sequence[Named]) -> list[np.ndarray]:
        """For each (image, name) the probability that a pixel shows the name, float32 [height,
        width]."""
        ...


@dataclass(frozen=True)
class Masks:
    """Step 3: the mask of each entity, from a model or a file, and the records that are built of
    them."""

    plan: BuildPlan
    images: SquareImages
    entities: StepFolder
    output: StepFolder
    finder: OnDemand[Segmenter] | Annotations
    form: ImageFormat
    threshold: float
    min_side: int
    """Pixels; an entity whose square is smaller is left out."""
    batch_size: int
    num_threads: int

    def rows(self, shard: int) -> Iterator[Row]:
        """Yields rows {"key", "record", "entities", "areas": share of the image, "left_out"} of a
        shard."""
        named = {row["key"]: row for row in self.entities.read(shard) if "rejected" not in row}
        images = (p for p in self.plan.images(shard) if p.key in named)
        read = read_ahead(self._read, images, 2 * self.batch_size, self.num_threads)
        with record_file(self.output.shard(shard).with_suffix(".tar"), self.form) as writer:
            for batch in in_batches(read, self.batch_size):
                ready = [(p, named[p.key], i) for p, i in batch if not isinstance(i, Rejected)]
                yield from (rejected_row(p.key, i) for p, i in batch if isinstance(i, Rejected))
                for one, masks in zip(ready, self._find(ready), strict=True):
                    yield self._write(writer, one, masks)

    def _read(self, planned: PlannedRecord) -> Image.Image:
        return self.images.square(_usable(planned))

    def _find(self, ready: list[Ready]) -> list[list[np.ndarray | Rejected | None]]:
        """A mask (or why there is none) for each entity of each image."""
        if isinstance(self.finder, Annotations):
            return [self._from_file(self.finder, planned, row) for planned, row, _ in ready]
        named = [(image, entity["text"]) for _, row, image in ready for entity in row["entities"]]
        model = self.finder.get()
        found = (map_ for part in in_batches(named, self.batch_size) for map_ in model(part))
        return [[self._region(next(found)) for _ in row["entities"]] for _, row, _ in ready]

    def _region(self, probability: np.ndarray) -> np.ndarray | Rejected:
        try:
            return 255 * entity_region(probability, self.threshold).astype(np.uint8)
        except Rejected as rejected:
            return rejected

    def _from_file(
        self, annotations: Annotations, planned: PlannedRecord, row: Row
    ) -> list[np.ndarray | Rejected | None]:
        try:
            annotated = list_field(annotations.find(row["key"]), "entities")
        except Rejected as rejected:
            return [rejected] * len(row["entities"])
        masks: list[np.ndarray | Rejected | None] = []
        for entity in row["entities"]:
            try:
                name = _mask_name(entity, annotated)
                data = None if name is None else annotations.file(name)
                mask = None if data is None else self.images.mask(_usable(planned), data)
                masks.append(mask)
            except Rejected as rejected:
                masks.append(rejected)
        return masks

    def _write(
        self, writer: RecordWriter, ready: Ready, masks: list[np.ndarray | Rejected | None]
    ) -> Row:
        planned, row, image = ready
        kept: list[CutEntity] = []
        areas, left_out = [], []
        for entity, mask in zip(row["entities"], masks, strict=True):
            try:
                if isinstance(mask, Rejected):
                    raise mask
                kept.append(self._cut(image, entity, mask))
                areas.append(1.0 if mask is None else round(float(mask.mean()) / 255, 4))
            except Rejected as rejected:
                left_out.append(rejected.reason)
        if not kept:
            rejected = rejected_row(planned.key, Rejected("no entity has a mask"))
            return rejected | {"left_out": left_out}
        key = writer.add(planned.key, row["caption"], image, kept)
        return {
            "key": planned.key,
            "record": key,
            "entities": [entity.text for entity in kept],
            "areas": areas,
            "left_out": left_out,
        }

    def _cut(
        self, image: Image.Image, entity: dict[str, Any], mask: np.ndarray | None
    ) -> CutEntity:
        if mask is None:
            return CutEntity(entity["text"], entity["span"], image, None)
        region = mask > HALF
        if not region.any():
            raise Rejected("mask is empty")
        left, top, side = square_around(region)
        if side < self.min_side:
            raise Rejected("entity is smaller than --min-entity-side")
        box = (left, top, left + side, top + side)
        cut_mask = mask[top : top + side, left : left + side]
        return CutEntity(entity["text"], entity["span"], image.crop(box), cut_mask)


def _usable(planned: PlannedRecord) -> Record:
    if isinstance(planned.record, Rejected):
        raise planned.record
    return planned.record


def _mask_name(entity: dict[str, Any], annotated: list[Any]) -> str | None:
    """The mask file of the entity with the same span, else the same words; None: no background."""
    described = [other for other in annotated if isinstance(other, dict)]
    same = [other for other in described if other.get("span") == entity["span"]]
    same = same or [
        other for other in described if str(other.get("text")).lower() == entity["text"].lower()
    ]
    if not same or "mask" not in same[0]:
        raise Rejected("the file has no mask of the entity")
    name = same[0]["mask"]
    if name is not None and not isinstance(name, str):
        raise Rejected("mask is not a file name", repr(name)[:80])
    return name
