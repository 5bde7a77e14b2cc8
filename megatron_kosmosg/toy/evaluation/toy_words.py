"""Does a `pretrain` model name what an image shows? Teacher-forced words after a held-out image.

At each word of "<image> a red circle with blue dots" the model chooses among the words of that
kind (four shapes, six coarse colours); the pattern is right when "with" follows the shape exactly
where there is a pattern, and the pattern's word is chosen.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_kosmosg.inference.trained_model import TrainedModel
from megatron_kosmosg.toy.evaluation.metric_row import MetricRow
from megatron_kosmosg.toy.evaluation.toy_prompts import scenes, subject_image
from megatron_kosmosg.toy.toy_captions import noun_phrase
from megatron_kosmosg.toy.world import COARSE_WORDS, PATTERNS, SHAPES

THRESHOLDS = {"shape": 0.95, "pattern": 0.95, "colour": 0.80}
CHANCE = {"shape": 1 / 4, "pattern": 1 / 3, "colour": 1 / 6}
NEAR_CHANCE = 0.15
"""What a shuffled image may give above chance: sampling error, and pairs that agree by luck."""


def word_rows(model: TrainedModel, seed: int, count: int, with_thresholds: bool) -> list[MetricRow]:
    """Accuracy per kind of word with the right image, and with the next prompt's image."""
    entities = [scene.entities[0] for scene in scenes(seed, count, 1)]
    rng = np.random.default_rng((seed, 17))
    words = [f"a {noun_phrase(entity, 'coarse', rng)}" for entity in entities]
    images = [subject_image(entity, seed * 1000 + i) for i, entity in enumerate(entities)]
    shuffled = images[1:] + images[:1]
    rows = []
    for title, shown in (("the image", images), ("another prompt's image", shuffled)):
        accuracy = _accuracy(model, shown, words)
        for kind, value in accuracy.items():
            limit = THRESHOLDS[kind] if shown is images else CHANCE[kind] + NEAR_CHANCE
            rows.append(
                MetricRow(
                    group="pretrain",
                    name=f"{kind} word, shown {title}",
                    value=value,
                    unit="share",
                    n=count,
                    seed=seed,
                    chance=CHANCE[kind],
                    threshold=round(limit, 2) if with_thresholds else None,
                    direction=">=" if shown is images else "<=",
                )
            )
    return rows


def _accuracy(model: TrainedModel, images: list, words: list[str]) -> dict[str, float]:
    hits: dict[str, list[bool]] = {kind: [] for kind in THRESHOLDS}
    parts = [[image, text] for image, text in zip(images, words, strict=True)]
    logits, _ = model.logits(parts)
    start = 1 + model.sequence_format.image_length
    for row, text in enumerate(words):
        # logits[k] predicts word k; the last row predicts what follows the text
        scores = logits[row, start - 1 : start + len(text.split())].float()
        _score_words(model, text.split(), scores, hits)
    return {kind: sum(values) / len(values) for kind, values in hits.items()}


def _score_words(
    model: TrainedModel, words: list[str], scores: torch.Tensor, hits: dict[str, list[bool]]
) -> None:
    """Notes in `hits` which of the words the model would have said. `scores` is [len(words) + 1,
    v]."""

    def chosen(position: int, choices: tuple[str, ...]) -> str:
        ids = [_id(model, word) for word in choices]
        return choices[int(scores[position, ids].argmax())]

    for position, word in enumerate(words):
        if word in SHAPES:
            hits["shape"].append(chosen(position, SHAPES) == word)
            follows = int(scores[position + 1].argmax()) == _id(model, "with")
        elif word in COARSE_WORDS:
            hits["colour"].append(chosen(position, COARSE_WORDS) == word)
    patterned = words[-1] in PATTERNS
    right = follows == patterned
    if patterned:
        right = right and chosen(len(words) - 1, PATTERNS[1:]) == words[-1]
    hits["pattern"].append(right)


def _id(model: TrainedModel, word: str) -> int:
    ids = model.tokenizer.encode(word)
    if len(ids) != 1:
        raise ValueError(f"{word!r} takes {len(ids)} pieces; this measure needs one piece a word")
    return ids[0]
