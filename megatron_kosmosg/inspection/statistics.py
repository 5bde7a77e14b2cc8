"""Counts and length distributions of a dataset: lengths from its index, token use from a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.stored_sample import IMAGE, TOKENS
from megatron_kosmosg.data.tokenizer import Tokenizer

MOST_LOOKED_AT = 500_000
"""Samples whose lengths are counted; of more, so many are spread evenly."""
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
BARS = 16


@dataclass(frozen=True)
class Lengths:
    """One quantity of every sample that was looked at, such as its tokens."""

    name: str
    values: np.ndarray
    """[samples]."""

    def quantiles(self) -> list[int]:
        """The quantity at the percentages of QUANTILES."""
        return [int(q) for q in np.percentile(self.values, QUANTILES, method="nearest")]

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, up to and including, number of samples) of at most BARS equally wide bars."""
        low, high = int(self.values.min()), int(self.values.max())
        width = max(1, -(-(high - low + 1) // BARS))
        counts = np.bincount((self.values - low) // width)
        starts = [low + i * width for i in range(len(counts))]
        return [
            (start, min(start + width - 1, high), int(count))
            for start, count in zip(starts, counts, strict=True)
        ]


@dataclass(frozen=True)
class TokenUse:
    """What the text of some samples is made of."""

    num_samples: int
    num_tokens: int
    num_unknown: int
    num_distinct: int
    most_frequent: list[tuple[str, int]]
    """(text of the token, times)."""
    tokens_per_word: float


def looked_at(store: SampleStore) -> np.ndarray:
    """The numbers of the samples whose lengths are counted, int64, increasing."""
    count = min(len(store), MOST_LOOKED_AT)
    return np.arange(count) * len(store) // count


def length_statistics(store: SampleStore) -> list[Lengths]:
    """Text tokens, images and image bytes per sample, from the index alone; of large datasets
    those of `looked_at`."""
    chosen = looked_at(store)
    tokens, images, image_bytes = (np.zeros(len(chosen), np.int64) for _ in range(3))
    for i, sample in enumerate(chosen.tolist()):
        for mode, size in store.part_sizes(sample):
            if mode == TOKENS:
                tokens[i] += size
            elif mode == IMAGE:
                images[i] += 1
                image_bytes[i] += size
    found = [Lengths("text tokens", tokens)]
    if images.any():
        found += [Lengths("images", images), Lengths("image bytes", image_bytes)]
    return found


def token_use(store: SampleStore, tokenizer: Tokenizer, most: int, seed: int) -> TokenUse:
    """Which tokens the texts of at most `most` samples use; the samples are drawn by `seed`."""
    order = SampleOrder("inspection", len(store), seed, "inspection")
    chosen = min(most, len(store))
    ids = [part for i in range(chosen) for part in store[order[i]].tokens()]
    everything = np.concatenate([np.zeros(0, np.int32), *ids])
    everything = everything[everything != tokenizer.eos_id]
    values, counts = np.unique(everything, return_counts=True)
    by_count = np.argsort(-counts, kind="stable")[:20]
    num_words = sum(len(tokenizer.decode(part).split()) for part in ids)
    return TokenUse(
        chosen,
        len(everything),
        int((everything == tokenizer.unk_id).sum()),
        len(values),
        [(tokenizer.decode([int(values[i])]) or "(space)", int(counts[i])) for i in by_count],
        len(everything) / max(num_words, 1),
    )
