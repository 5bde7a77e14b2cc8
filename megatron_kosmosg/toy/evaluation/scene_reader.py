"""Reads shapes, patterns and hues from an image of the toy world by analysis through synthesis.

Nothing is learnt: for each template (shape, pattern, centre, radius) the best colours are a least
squares problem over the pixels' coverages, and the template that leaves the least error is what
the image shows. Of two entities each is looked for in its half.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_kosmosg.toy.world import (
    IMAGE_SIZE,
    PATTERNS,
    SHAPES,
    Entity,
    Scene,
    coarse_index,
    coverages,
    hue_distance,
)

LOOKS = tuple(itertools.product(SHAPES, PATTERNS))
PATTERN_PENALTY = 1.0
"""Squared error, summed over values in [-1, 1], by which a patterned template must be better."""
MIN_CONTRAST = 0.3
"""Least distance of the two colours of a pattern, in [-1, 1] RGB."""
CHUNK = 32
GRIDS = {
    1: ((14.5, 17.5), (14.5, 17.5), (8.25, 10.25)),
    2: ((7.0, 9.0), (14.0, 18.0), (5.75, 7.25)),
}
"""First and last x, y and radius of the templates; for two entities those of the left half."""
GRID_STEP = 0.5


@dataclass(frozen=True)
class EntityComparison:
    """The comparison of one entity of an image with its truth; errors are in degrees."""

    shape_correct: bool
    pattern_correct: bool
    hue_error_deg: float
    hue_b_error_deg: float | None
    """None unless both are patterned."""
    colour_word_correct: bool

    @property
    def all_correct(self) -> bool:
        """Whether shape, pattern and coarse first colour are all right."""
        return self.shape_correct and self.pattern_correct and self.colour_word_correct


@dataclass(frozen=True)
class SceneComparison:
    """The comparison of one image with its truth; the background's error is in degrees."""

    entities: tuple[EntityComparison, ...]
    background_hue_error: float
    background_word_correct: bool


@dataclass(frozen=True)
class Templates:
    """Look-major: look l at place g is template l * len(places) + g; p = pixels of the window."""

    places: list[tuple[float, float, float]]
    """x, y, radius."""
    basis: Tensor
    """[t, 3, p], orthonormal rows that span the coverages of A, background and B."""
    to_colours: Tensor
    """[t, 3, 3]: projections on the basis -> colours of A, background and B."""


def read_scenes(images: Tensor, num_entities: Sequence[int]) -> list[Scene]:
    """What each image [n, 3, 32, 32] in [-1, 1] shows, given how many entities to look for.

    A plain entity's hue B repeats its hue A.
    """
    if tuple(images.shape) != (len(num_entities), 3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images {tuple(images.shape)} for {len(num_entities)} counts of entities")
    if not set(num_entities) <= set(GRIDS):
        raise ValueError(f"num_entities={sorted(set(num_entities))}: one or two can be read")
    images = images.detach().float().cpu().clamp(-1.0, 1.0)
    scenes: dict[int, Scene] = {}
    for count in GRIDS:
        rows = [i for i, number in enumerate(num_entities) if number == count]
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            scenes |= zip(chunk, _read(images[chunk], count), strict=True)
    return [scenes[i] for i in range(len(num_entities))]


def compare(seen: Scene, truth: Scene) -> SceneComparison:
    """What was seen beside the truth; entities are compared from left to right."""
    if seen.background_hue is None or truth.background_hue is None:
        raise ValueError("a white background has no hue to compare")
    pairs = zip(seen.entities, truth.entities, strict=True)
    return SceneComparison(
        tuple(_compare_entity(*pair) for pair in pairs),
        hue_distance(seen.background_hue, truth.background_hue),
        coarse_index(seen.background_hue) == coarse_index(truth.background_hue),
    )


def summarise(comparisons: Sequence[SceneComparison]) -> dict[str, float]:
    """Shares of correct entities and backgrounds, mean and median hue errors in degrees."""
    entities = [entity for comparison in comparisons for entity in comparison.entities]
    second = [e.hue_b_error_deg for e in entities if e.hue_b_error_deg is not None]
    hues = {
        "hue": [entity.hue_error_deg for entity in entities],
        "hue_b": second,
        "background_hue": [comparison.background_hue_error for comparison in comparisons],
    }
    result = {
        "shape": statistics.fmean(entity.shape_correct for entity in entities),
        "pattern": statistics.fmean(entity.pattern_correct for entity in entities),
        "colour_word": statistics.fmean(entity.colour_word_correct for entity in entities),
        "all": statistics.fmean(entity.all_correct for entity in entities),
        "background_word": statistics.fmean(v.background_word_correct for v in comparisons),
    }
    for name, errors in hues.items():
        if errors:
            result[f"{name}_mean"] = statistics.fmean(errors)
            result[f"{name}_median"] = statistics.median(errors)
    return result


def _compare_entity(seen: Entity, truth: Entity) -> EntityComparison:
    patterned = "plain" not in (seen.pattern, truth.pattern)
    return EntityComparison(
        seen.shape == truth.shape,
        seen.pattern == truth.pattern,
        hue_distance(seen.hue_a, truth.hue_a),
        hue_distance(seen.hue_b, truth.hue_b) if patterned else None,
        coarse_index(seen.hue_a) == coarse_index(truth.hue_a),
    )


def _read(images: Tensor, count: int) -> list[Scene]:
    windows = images.chunk(count, dim=-1)
    found = [_read_window(window, count) for window in windows]
    scenes = []
    for row in range(len(images)):
        entities, backgrounds = [], []
        for place, (looks, places, colours) in enumerate(found):
            shape, pattern = LOOKS[looks[row]]
            x, y, radius = templates(count).places[places[row]]
            hue_a, _, hue_b = (hue_of(colour) for colour in colours[row])
            x += place * IMAGE_SIZE / count
            second = hue_a if pattern == "plain" else hue_b
            entities.append(Entity(shape, pattern, hue_a, second, x, y, radius))
            backgrounds.append(colours[row, 1])
        scenes.append(Scene(tuple(entities), hue_of(torch.stack(backgrounds).mean(0))))
    return scenes


def _read_window(windows: Tensor, count: int) -> tuple[list[int], list[int], Tensor]:
    """Look and place of the best template per window; its colours [n, 3 (A, background, B), 3]."""
    grid = templates(count)
    pixels = windows.permute(0, 2, 3, 1).flatten(1, 2)
    rows = torch.arange(len(pixels))
    projected = torch.einsum("tkp,npc->ntkc", grid.basis, pixels)
    explained = projected.square().sum((2, 3)).unflatten(1, (len(LOOKS), -1))
    explained, places = explained.max(2)
    chosen = places + torch.arange(len(LOOKS)) * len(grid.places)
    colours = torch.einsum(
        "nlij,nljc->nlic", grid.to_colours[chosen], projected[rows[:, None], chosen]
    )
    patterned = torch.tensor([pattern != "plain" for _, pattern in LOOKS])
    contrast = (colours[:, :, 0] - colours[:, :, 2]).norm(dim=-1)
    score = explained - PATTERN_PENALTY * patterned
    score = score.masked_fill(patterned & (contrast < MIN_CONTRAST), -torch.inf)
    looks = score.argmax(1)
    return looks.tolist(), places[rows, looks].tolist(), colours[rows, looks]


@cache
def templates(count: int) -> Templates:
    """The templates of a window that holds one of `count` entities."""
    axes = [torch.arange(low, high + 1e-6, GRID_STEP).tolist() for low, high in GRIDS[count]]
    places = list(itertools.product(*axes))
    bases, inverses = [], []
    for shape, pattern in LOOKS:
        entities = [Entity(shape, pattern, 0.0, 0.0, *place) for place in places]
        parts = coverages(entities)[..., : IMAGE_SIZE // count].flatten(2).transpose(1, 2)
        shown_a, shown_b = parts[..., 0], parts[..., 1]
        columns = torch.stack([shown_a, 1.0 - shown_a - shown_b, shown_b], -1)
        if pattern == "plain":
            basis, triangle = torch.linalg.qr(columns[..., :2])
            basis = torch.nn.functional.pad(basis, (0, 1))
            inverse = torch.nn.functional.pad(torch.linalg.inv(triangle), (0, 1, 0, 1))
        else:
            basis, triangle = torch.linalg.qr(columns)
            inverse = torch.linalg.inv(triangle)
        bases.append(basis.transpose(1, 2))
        inverses.append(inverse)
    return Templates(places, torch.cat(bases).contiguous(), torch.cat(inverses))


def hue_of(colour: Tensor) -> float:
    """Hue in degrees of an RGB colour [3], in any linear scale; 0 for a grey."""
    red, green, blue = colour.tolist()
    high, low = max(red, green, blue), min(red, green, blue)
    if high == low:
        return 0.0
    if high == red:
        sixth = (green - blue) / (high - low)
    elif high == green:
        sixth = 2.0 + (blue - red) / (high - low)
    else:
        sixth = 4.0 + (red - green) / (high - low)
    return (60.0 * sixth) % 360.0
