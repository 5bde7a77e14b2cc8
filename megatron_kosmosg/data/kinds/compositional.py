"""Kind `compositional`: a caption whose entities are shown as pictures (the authors' Open Images).

Stored parts: JSON {key, caption, entities: [{text, span, has_mask}], ...}, target picture, then for
each entity, in the order of their spans, the tokens of the caption up to its end and up to its
start (from where the previous entity ended), its picture and, if it has one, its mask; last the
tokens of the tail. Both readings are stored because each run of text is tokenised on its own.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from megatron_kosmosg.data.keyed import Draws
from megatron_kosmosg.data.samples import EntityImage, Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.store import TOKENS, PartSizes, RawSample


def target_picture(raw: RawSample) -> memoryview:
    """The encoded picture that `instruct` learns to draw."""
    return memoryview(raw.parts[0])


class CompositionalPrompts:
    """<s> caption with a picture after (or, words dropped, in place of) each entity."""

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

    def length(self, sizes: PartSizes, draws: Draws) -> int:
        """Tokens of the prompt."""
        texts = [size for mode, size in sizes if mode == TOKENS]
        num_entities = len(texts) // 2
        chosen = sum(
            texts[2 * i + self._drops_words(i, draws)] + self._format.image_length
            for i in range(num_entities)
        )
        return 1 + chosen + texts[-1]

    def __call__(self, raw: RawSample, draws: Draws) -> Prompt:
        """The prompt; coins decide on the entities' words and on each picture's background."""
        parts = iter(raw.parts[1:])
        builder = SequenceBuilder(self._format).add_start()
        for i, entity in enumerate(raw.info["entities"]):
            with_words, without_words = next(parts), next(parts)
            image = next(parts)
            mask = next(parts) if entity["has_mask"] else None
            builder.add_text(without_words if self._drops_words(i, draws) else with_words)
            builder.add_image(self._picture(i, image, mask, draws))
        builder.add_text(next(parts))
        return builder.prompt(target_picture(raw), raw.info["caption"])

    def _drops_words(self, entity: int, draws: Draws) -> bool:
        tag = "entity text"
        if self._text_drop_per == "entity":
            tag = f"entity text/{entity}"
        return draws.coin(tag, self._text_drop_prob)

    def _picture(
        self, entity: int, image: np.ndarray, mask: np.ndarray | None, draws: Draws
    ) -> bytes | EntityImage:
        if mask is None or draws.coin(f"background/{entity}", self._background_keep_prob):
            return EntityImage(image.tobytes())
        return EntityImage(image.tobytes(), mask.tobytes())
