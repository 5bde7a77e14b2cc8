"""Scores of generated images against reference images and texts, each with its interval.

DINO and CLIP-I compare an image with what it should resemble, CLIP-T with the text it should
follow: cosines of features, averaged, and floored at 0 as in the published scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from megatron_kosmosg.data.random_keys import numpy_generator
from megatron_kosmosg.evaluation.feature_files import (
    FeatureFiles,
    Group,
    ImageGroup,
    TextGroup,
)
from megatron_kosmosg.evaluation.networks import IMAGE_RULES, Weights

METRICS = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
"""By the name in the result: the name for people."""
OF_REFERENCES = ("dino", "clip_i")
"""Those that compare with images."""
BOOTSTRAP_DRAWS, BOOTSTRAP_SEED, BOOTSTRAP_ROWS = 1000, 0, 50
"""Rows: draws that are made at once."""
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Item:
    """A generated image and what it is compared with."""

    name: str
    generated: Path
    references: tuple[Path, ...] = ()
    """Scores are averaged over them."""
    text: str | None = None
    cluster: str = ""
    """Items of one cluster resemble each other; intervals come from drawing clusters. Empty: the
    item stands for itself."""


@dataclass(frozen=True)
class Summary:
    """A mean over items, with the middle 95 % of it when clusters are drawn with replacement."""

    value: float
    low: float
    high: float
    count: int

    def to_json(self) -> dict[str, float | int]:
        return {
            "value": round(self.value, 6),
            "low": round(self.low, 6),
            "high": round(self.high, 6),
            "n": self.count,
        }


def similarity_groups(items: Sequence[Item], weights: Mapping[str, Weights]) -> list[Group]:
    """The groups of images and texts whose features the metrics need that the weights allow."""
    rules = {name: rule for name, rule in IMAGE_RULES.items() if name in weights}
    groups: list[Group] = []
    if rules:
        groups.append(ImageGroup("generated", tuple(item.generated for item in items), rules))
        references = _distinct([path for item in items for path in item.references])
        if references:
            groups.append(ImageGroup("references", tuple(references), rules))
    texts = _distinct([item.text for item in items if item.text is not None])
    if "clip" in weights and texts:
        groups.append(TextGroup("texts", tuple(texts)))
    return groups


def similarities(
    items: Sequence[Item], weights: Mapping[str, Weights], files: FeatureFiles
) -> dict[str, list[list[float]]]:
    """For each metric the scores of every item, one for each reference: {metric: [scores of an
    item, ...]}. An item without reference or text has none, and a metric that no item has is left
    out."""
    found: dict[str, list[list[float]]] = {}
    for network, metric in (("dino", "dino"), ("clip", "clip_i")):
        paths = _distinct([path for item in items for path in item.references])
        if network in weights and paths:
            rows = {path: i for i, path in enumerate(paths)}
            compared = [[rows[path] for path in item.references] for item in items]
            found[metric] = _cosines(files, network, "references", compared)
    texts = _distinct([item.text for item in items if item.text is not None])
    if "clip" in weights and texts:
        places = {text: i for i, text in enumerate(texts)}
        compared = [[] if item.text is None else [places[item.text]] for item in items]
        found["clip_t"] = _cosines(files, "clip", "texts", compared)
    return found


def _cosines(
    files: FeatureFiles, network: str, other: str, compared: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The similarity of each generated image to the rows of another group that it is compared with.
    Works on a shard of images at a time: memory does not grow with their number."""
    rows_of = files.rows(other, network)
    found: list[list[float]] = []
    for block in files.blocks("generated", network):
        generated = F.normalize(block.double(), dim=1)
        for image, rows in zip(generated, compared[len(found) :], strict=False):
            if rows:
                others = F.normalize(rows_of(rows).double(), dim=1)
                found.append((others @ image).tolist())
            else:
                found.append([])
    return found


def summarise(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> Summary:
    """The mean of the scores and its interval. `scores` has for each item one score a reference;
    items without any do not count."""
    kept = [
        (item.cluster or f"{i}", sum(each) / len(each))
        for i, (item, each) in enumerate(zip(items, scores, strict=True))
        if each
    ]
    names = {name: i for i, name in enumerate(_distinct([name for name, _ in kept]))}
    clusters = np.array([names[name] for name, _ in kept])
    values = np.array([value for _, value in kept])
    sums = np.bincount(clusters, weights=values)
    counts = np.bincount(clusters)
    random = numpy_generator(BOOTSTRAP_SEED, "evaluation", 0, "bootstrap")
    means = []
    for start in range(0, BOOTSTRAP_DRAWS, BOOTSTRAP_ROWS):
        rows = min(BOOTSTRAP_ROWS, BOOTSTRAP_DRAWS - start)
        drawn = random.integers(0, len(sums), size=(rows, len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), PERCENTILES)
    floored = [max(0.0, float(value)) for value in (values.mean(), low, high)]
    return Summary(floored[0], floored[1], floored[2], len(values))


def _distinct(items: Sequence) -> list:
    """The distinct items in the order of their first occurrence."""
    return list(dict.fromkeys(items))
