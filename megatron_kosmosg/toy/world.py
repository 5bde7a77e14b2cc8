"""The toy world: coloured shapes on pastel backgrounds, as a pure function of an integer seed.

Colours are continuous hues, so an image says more than its caption. One scene is 32x32 RGB, drawn
at 64x64 and averaged 2x2. Combinations of (shape, pattern, coarse colour) in `is_heldout` never
occur in a training scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
PATTERNS = ("plain", "stripes", "dots")
COARSE_WORDS = ("red", "yellow", "green", "cyan", "blue", "magenta")
FINE_WORDS = (
    *("crimson", "scarlet", "vermilion", "amber", "gold", "lime"),
    *("chartreuse", "emerald", "jade", "mint", "teal", "sky"),
    *("azure", "navy", "indigo", "violet", "purple", "pink"),
)
ENTITY_SATURATION, ENTITY_VALUE = 0.9, 0.95
BACKGROUND_SATURATION, BACKGROUND_VALUE = 0.3, 0.97
MIN_HUE_GAP = 60.0
"""Least distance in degrees between the two hues of one entity."""


@dataclass(frozen=True)
class Entity:
    """One shape: hues in degrees [0, 360), centre and radius in pixels of the 32x32 image."""

    shape: str
    pattern: str
    hue_a: float
    hue_b: float
    """Hue of the stripes or dots; drawn by nobody when the pattern is plain."""
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Entities from left to right on a plain background; hue None is white."""

    entities: tuple[Entity, ...]
    background_hue: float | None

    def to_json(self) -> dict[str, Any]:
        """The scene as plain lists, strings and numbers."""
        return asdict(self)

    @staticmethod
    def from_json(record: dict[str, Any]) -> Scene:
        """The scene that `to_json` wrote down."""
        entities = tuple(Entity(**entity) for entity in record["entities"])
        return Scene(entities, record["background_hue"])


def coarse_index(hue: float) -> int:
    """Index into COARSE_WORDS: bins of 60 degrees centred on 0, 60, ..."""
    return int(((hue + 30.0) % 360.0) // 60.0)


def fine_index(hue: float) -> int:
    """Index into FINE_WORDS: three bins of 20 degrees inside each coarse bin."""
    return int(((hue + 30.0) % 360.0) // 20.0)


def hue_distance(a: float, b: float) -> float:
    """Angle between two hues in degrees, 0 to 180."""
    return abs((a - b + 180.0) % 360.0 - 180.0)


def is_heldout(shape: str, pattern: str, hue_a: float) -> bool:
    """Whether the combination is kept out of everything that is trained (about one in eight)."""
    s, p, c = SHAPES.index(shape), PATTERNS.index(pattern), coarse_index(hue_a)
    return (7 * s + 3 * p + 5 * c + (s * p) % 3) % 8 == 0


def _sample_look(rng: np.random.Generator, heldout: bool) -> tuple[str, str, float, float]:
    while True:
        shape, pattern = SHAPES[rng.integers(4)], PATTERNS[rng.integers(3)]
        hue_a = float(rng.uniform(0, 360))
        if is_heldout(shape, pattern, hue_a) == heldout:
            gap = rng.uniform(MIN_HUE_GAP, 360 - MIN_HUE_GAP)
            return shape, pattern, hue_a, float((hue_a + gap) % 360)


def sample_scene(seed: int | Sequence[int], num_entities: int, heldout: bool) -> Scene:
    """A scene of one or two entities, all of them from held-out combinations or none."""
    rng = np.random.default_rng(seed)
    if num_entities == 1:
        looks = [_sample_look(rng, heldout)]
        places = [(rng.uniform(15, 17), rng.uniform(15, 17), rng.uniform(8.5, 10))]
    elif num_entities == 2:
        looks = [_sample_look(rng, heldout) for _ in range(2)]
        places = [
            (rng.uniform(left, left + 1), rng.uniform(14.5, 17.5), rng.uniform(6, 7))
            for left in (7.5, 23.5)
        ]
    else:
        raise ValueError(f"num_entities={num_entities}: a scene holds one or two entities")
    entities = [
        Entity(*look, *(float(value) for value in place))
        for look, place in zip(looks, places, strict=True)
    ]
    return Scene(tuple(entities), float(rng.uniform(0, 360)))


def subject_scene(entity: Entity, background_hue: float | None, seed: int | Sequence[int]) -> Scene:
    """The entity alone and large, as a crop of its bounding box would show it."""
    rng = np.random.default_rng(seed)
    x, y, radius = rng.uniform(15, 17), rng.uniform(15, 17), rng.uniform(11, 14)
    alone = replace(entity, x=float(x), y=float(y), radius=float(radius))
    return Scene((alone,), background_hue)


def hsv_to_rgb(hue: Tensor, saturation: float | Tensor, value: float) -> Tensor:
    """RGB in [0, 1], shape hue.shape + [3], of hues in degrees."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[..., None] / 60.0) % 6.0
    ramp = torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)
    saturation = torch.as_tensor(saturation)
    return value * (1.0 - saturation[..., None] * ramp)


def shape_inside(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Whether (u, v), offsets from the centre in radii, lie in the shape of index `shape`."""
    absu, absv = u.abs(), v.abs()
    low, high = torch.minimum(absu, absv), torch.maximum(absu, absv)
    choices = torch.stack(
        [
            u * u + v * v < 1.0,
            high < 0.85,
            (v < 0.8) & (absu < 0.55 * (v + 1.0)),
            (low < 0.36) & (high < 1.0),
        ]
    )
    return _choose(choices, shape)


def pattern_second(pattern: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Whether (u, v) shows the second colour of the pattern of index `pattern`."""
    du = (u + 0.35) % 0.7 - 0.35
    dv = (v + 0.35) % 0.7 - 0.35
    choices = torch.stack(
        [
            torch.zeros_like(u, dtype=torch.bool),
            torch.floor(2.0 * (v + 1.0)) % 2.0 == 1.0,
            du * du + dv * dv < 0.06,
        ]
    )
    return _choose(choices, pattern)


def _choose(choices: Tensor, index: Tensor) -> Tensor:
    """candidates[index[i], i] for each leading element i of the other dimensions."""
    return choices[index, torch.arange(choices.shape[1])]


def pixel_grid() -> Tensor:
    """Centres of the 64 fine sample points along one axis, in pixels of the 32x32 image."""
    return (torch.arange(2 * IMAGE_SIZE) + 0.5) / 2.0


def _offsets(x: Tensor, y: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    grid = pixel_grid()
    u = (grid[None, None, :] - x[:, None, None]) / radius[:, None, None]
    v = (grid[None, :, None] - y[:, None, None]) / radius[:, None, None]
    shape = (len(x), 2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
    return u.expand(shape), v.expand(shape)


def render_batch(scenes: Sequence[Scene]) -> Tensor:
    """Images float32 [n, 3, 32, 32] in [-1, 1]; white where a scene has no background hue."""
    hues = torch.tensor([scene.background_hue or 0.0 for scene in scenes])
    white = torch.tensor([scene.background_hue is None for scene in scenes])
    saturation = torch.where(white, 0.0, BACKGROUND_SATURATION)
    background = hsv_to_rgb(hues, saturation, BACKGROUND_VALUE)
    background[white] = 1.0
    canvas = background[:, None, None, :].repeat(1, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE, 1)
    for place in range(max(len(scene.entities) for scene in scenes)):
        rows = [i for i, scene in enumerate(scenes) if len(scene.entities) > place]
        entities = [scenes[i].entities[place] for i in rows]
        inside, second = _masks(entities)
        colour_a, colour_b = (
            hsv_to_rgb(torch.tensor(hue), ENTITY_SATURATION, ENTITY_VALUE)[:, None, None, :]
            for hue in ([e.hue_a for e in entities], [e.hue_b for e in entities])
        )
        paint = torch.where(second[..., None], colour_b, colour_a)
        canvas[rows] = torch.where(inside[..., None], paint, canvas[rows])
    image = torch.nn.functional.avg_pool2d(canvas.permute(0, 3, 1, 2), 2)
    return (image * 2.0 - 1.0).contiguous()


def _masks(entities: Sequence[Entity]) -> tuple[Tensor, Tensor]:
    """(inside the shape, showing the second colour): two masks bool [n, 64, 64]."""
    u, v = _offsets(
        *(torch.tensor([getattr(e, k) for e in entities]) for k in ("x", "y", "radius"))
    )
    shape = torch.tensor([SHAPES.index(e.shape) for e in entities])
    pattern = torch.tensor([PATTERNS.index(e.pattern) for e in entities])
    return shape_inside(shape, u, v), pattern_second(pattern, u, v)


def render(scene: Scene) -> Tensor:
    """The image, float32 [3, 32, 32] in [-1, 1]."""
    return render_batch([scene])[0]


def coverages(entities: Sequence[Entity]) -> Tensor:
    """The share of each pixel that shows hue A, and hue B: float32 [n, 2, 32, 32] in [0, 1]."""
    inside, second = _masks(entities)
    parts = torch.stack([inside & ~second, inside & second], 1).float()
    return torch.nn.functional.avg_pool2d(parts, 2)


def entity_masks(entities: Sequence[Entity]) -> Tensor:
    """The share of each pixel that the entity covers, float32 [n, 32, 32] in [0, 1]."""
    return coverages(entities).sum(1)
