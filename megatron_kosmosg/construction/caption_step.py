"""Step 1: a caption for each image, from a model, from a file, or from the input itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from megatron_kosmosg.construction.annotations import Annotations
from megatron_kosmosg.construction.on_demand import OnDemand
from megatron_kosmosg.construction.read_ahead import in_batches, read_ahead
from megatron_kosmosg.construction.shard_plan import BuildPlan, PlannedRecord
from megatron_kosmosg.construction.square_images import SquareImages
from megatron_kosmosg.construction.step_rows import Row, rejected_row
from megatron_kosmosg.data.kinds.record import Rejected, text_field

REPETITION_WORDS, REPETITION_SHARE = 8, 0.4
"""A caption of at least so many words repeats itself if fewer than this share are different."""


class Captioner(Protocol):
    """A model that describes images."""

    def __call__(self, images: list[Image.Image]) -> list[str]:
        """A caption for each RGB image."""
        ...


@dataclass(frozen=True)
class ProvidedCaptions:
    """Captions of a file, or, without one, those that the input has."""

    plan: BuildPlan
    annotations: Annotations | None

    def rows(self, shard: int) -> Iterator[Row]:
        """Yields rows {"key", "caption"} for the images of a shard."""
        for planned in self.plan.images(shard):
            try:
                yield {"key": planned.key, "caption": self._caption(planned)}
            except Rejected as rejected:
                yield rejected_row(planned.key, rejected)

    def _caption(self, planned: PlannedRecord) -> str:
        if isinstance(planned.record, Rejected):
            raise planned.record
        if self.annotations is None:
            return tidy(text_field(planned.record.fields, "caption"))
        return tidy(text_field(self.annotations.find(planned.key), "caption"))


@dataclass(frozen=True)
class ModelCaptions:
    """Step 1 with a model that writes the captions."""

    plan: BuildPlan
    images: SquareImages
    model: OnDemand[Captioner]
    batch_size: int
    num_threads: int

    def rows(self, shard: int) -> Iterator[Row]:
        """Yields rows {"key", "caption"} for the images of a shard."""
        model = self.model.get()
        read = read_ahead(
            self._read, self.plan.images(shard), 2 * self.batch_size, self.num_threads
        )
        for batch in in_batches(read, self.batch_size):
            images = [image for _, image in batch if not isinstance(image, Rejected)]
            captions = iter(model(images) if images else [])
            for planned, image in batch:
                if isinstance(image, Rejected):
                    yield rejected_row(planned.key, image)
                else:
                    yield _checked(planned.key, next(captions))

    def _read(self, planned: PlannedRecord) -> Image.Image:
        if isinstance(planned.record, Rejected):
            raise planned.record
        return self.images.square(planned.record)


def tidy(caption: str) -> str:
    """The caption on one line, without blanks around it."""
    return " ".join(caption.split())


def _checked(key: str, caption: str) -> Row:
    caption = tidy(caption)
    words = caption.lower().split()
    if not words:
        return rejected_row(key, Rejected("empty caption"))
    if len(words) >= REPETITION_WORDS and len(set(words)) < REPETITION_SHARE * len(words):
        return rejected_row(key, Rejected("caption repeats itself", caption))
    return {"key": key, "caption": caption}
