"""Kind `compositional`: a caption whose entities are shown as images (the authors' Open Images).

Stored parts: JSON {key, caption, entities: [{text, span, has_mask}], ...}, target image, then for
each entity, in the order of their spans, the tokens of the caption up to its end and up to its
start (from where the previous entity ended), its image and, if it has one, its mask; last the
tokens of the tail. Both readings are stored because each run of text is tokenised on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from megatron_kosmosg.config.schema import DataConfig
from megatron_kosmosg.data.kinds.entity_placement import order_entities
from megatron_kosmosg.data.kinds.kind import (
    Conversion,
    Converted,
    ImageSize,
    Prompts,
    SampleKind,
    UsualSize,
)
from megatron_kosmosg.data.kinds.record import Record, extra_fields, list_field
from megatron_kosmosg.data.samples import EntityImage, Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.stored_sample import IMAGE, TOKENS, PartSizes, RawSample, StoredPart

if TYPE_CHECKING:
    import numpy as np

    from megatron_kosmosg.data.random_keys import SampleKey
OVERLAP = "entities: words overlap the entity before"


def convert(record: Record, use: Conversion) -> Converted:
    """Converts a record {"key", "caption", "image", "entities": [{"text", "span", "image", "mask"},
    ...]}."""
    fields = record.fields
    caption, _ = use.text_field(fields, "caption")
    target = use.image(record, fields, "image")
    placed, tail = order_entities(caption, list_field(fields, "entities"))
    described: list[dict[str, Any]] = []
    parts = [StoredPart(IMAGE, target)]
    for entity in placed:
        image = use.image(record, entity.fields, "image")
        mask = use.mask(record, entity.fields, "mask", image)
        for words in (entity.with_words, entity.without_words):
            parts.append(StoredPart.tokens(use.encode(words)))
        parts.append(StoredPart(IMAGE, image))
        if mask is not None:
            parts.append(StoredPart(IMAGE, mask))
        kept = extra_fields(entity.fields, ("text", "span", "image", "mask"))
        described.append(
            {"text": entity.text, "span": entity.span, "has_mask": mask is not None} | kept
        )
    parts.append(StoredPart.tokens(use.encode(tail)))
    info = {"key": record.key, "caption": caption, "entities": described}
    info |= extra_fields(fields, ("key", "caption", "entities", "image"))
    num_overlaps = len(fields["entities"]) - len(placed)
    return Converted([StoredPart.json(info), *parts], (OVERLAP,) * num_overlaps)


def target_image(raw: RawSample) -> memoryview:
    """The encoded image that `instruct` learns to draw."""
    return raw.parts[0].data


class CompositionalPrompts:
    """Makes prompts <s> caption, with an image after each entity or, where its words are dropped,
    in their place."""

    def __init__(
        self,
        sequence_format: SequenceFormat,
        entity_text_drop_prob: float,
        entity_text_drop_per: Literal["sample", "entity"],
        background_keep_prob: float,
    ) -> None:
        self._format = sequence_format
        self._text_drop_prob = entity_text_drop_prob
        self._text_drop_per = entity_text_drop_per
        self._background_keep_prob = background_keep_prob

    def length(self, sizes: PartSizes, key: SampleKey) -> int:
        """Length of the prompt in tokens."""
        texts = [size for mode, size in sizes if mode == TOKENS]
        num_entities = len(texts) // 2
        chosen = sum(
            texts[2 * i + self._drops_words(i, key)] + self._format.image_length
            for i in range(num_entities)
        )
        return 1 + chosen + texts[-1]

    def __call__(self, raw: RawSample, key: SampleKey) -> Prompt:
        """The prompt; coins decide on the entities' words and on each image's background."""
        parts = iter(raw.parts[1:])
        builder = SequenceBuilder(self._format).add_start()
        for i, entity in enumerate(raw.info["entities"]):
            with_words, without_words = next(parts), next(parts)
            image = next(parts)
            mask = next(parts) if entity["has_mask"] else None
            builder.add_text(without_words if self._drops_words(i, key) else with_words)
            builder.add_image(self._image(i, image, mask, key))
        builder.add_text(next(parts))
        return builder.prompt(target_image(raw), raw.info["caption"])

    def _drops_words(self, entity: int, key: SampleKey) -> bool:
        tag = "entity text"
        if self._text_drop_per == "entity":
            tag = f"entity text/{entity}"
        return key.coin(tag, self._text_drop_prob)

    def _image(
        self, entity: int, image: np.ndarray, mask: np.ndarray | None, key: SampleKey
    ) -> bytes | EntityImage:
        if mask is None or key.coin(f"background/{entity}", self._background_keep_prob):
            return EntityImage(image.tobytes())
        return EntityImage(image.tobytes(), mask.tobytes())


def masks(raw: RawSample) -> dict[int, int]:
    """The target comes first, then each entity's image and, where it has one, its mask."""
    found, place = {}, 1
    for entity in raw.info["entities"]:
        if entity["has_mask"]:
            found[place + 1] = place
        place += 1 + bool(entity["has_mask"])
    return found


def check_spans(raw: RawSample, sizes: Sequence[ImageSize]) -> Iterator[str]:
    """Yields what is wrong with the spans of the caption."""
    caption, entities = raw.info["caption"], raw.info["entities"]
    expected = [IMAGE]
    for entity in entities:
        expected += [TOKENS, TOKENS, IMAGE, *[IMAGE] * bool(entity["has_mask"])]
    if raw.modes != [*expected, TOKENS]:
        yield f"parts {raw.modes} do not fit {len(entities)} entities"
        return
    end = 0
    for i, entity in enumerate(entities):
        start, stop = entity["span"]
        if not end <= start < stop <= len(caption):
            yield f"entity {i}: span {start}..{stop} does not lie behind {end} in the caption"
        elif caption[start:stop].lower() != entity["text"].lower():
            yield f"entity {i}: the span reads {caption[start:stop]!r}, not {entity['text']!r}"
        end = max(end, stop)


def _maker(sequence_format: SequenceFormat, data: DataConfig) -> CompositionalPrompts:
    return CompositionalPrompts(
        sequence_format,
        data.entity_text_drop_prob,
        data.entity_text_drop_per,
        data.background_keep_prob,
    )


COMPOSITIONAL = SampleKind(
    name="compositional",
    record="""\
{"key", "caption", "image", "entities": [
    {"text", "span": [start, end), "image", "mask": file or null}, ...]}""",
    fields=("caption", "image", "entities"),
    convert=convert,
    formats=("jsonl", "tar", "parquet", "arrow", "tsv", "files"),
    masks=masks,
    check=check_spans,
    instruct=Prompts(_maker, target_image, UsualSize(length=215, images=2.0)),
)
