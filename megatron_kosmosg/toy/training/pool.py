"""Pools of training scenes and their images, drawn once and kept in memory as bytes.

Only training combinations: `heldout=False` everywhere.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from megatron_kosmosg.progress import Progress
from megatron_kosmosg.toy.world import Scene, render_batch, sample_scene, subject_scene

CHUNK = 64


def scenes(seed: int, count: int, two_entities: float) -> list[Scene]:
    """`count` training scenes, of which the share `two_entities` holds two."""
    return [
        sample_scene((seed, i), 2 if ((i * 997) % 1000) / 1000 < two_entities else 1, False)
        for i in range(count)
    ]


def with_subjects(seed: int, drawn: list[Scene], every: int) -> list[Scene]:
    """The scenes, each `every`-th replaced by a large image of its last entity.

    Half of those keep their background colour, the others are white around the subject.
    """
    result = list(drawn)
    for i in range(0, len(drawn), every):
        background = drawn[i].background_hue if (i // every) % 2 else None
        result[i] = subject_scene(drawn[i].entities[-1], background, (seed, i))
    return result


def images(drawn: list[Scene]) -> Tensor:
    """The images of the scenes, uint8 [n, 3, 32, 32]."""
    parts = [
        to_bytes(render_batch(drawn[start : start + CHUNK]))
        for start in range(0, len(drawn), CHUNK)
    ]
    return torch.cat(parts)


def to_bytes(image: Tensor) -> Tensor:
    """An image in [-1, 1] as uint8."""
    return ((image + 1.0) * 127.5).round().clamp(0, 255).byte()


def from_bytes(image: Tensor) -> Tensor:
    """A uint8 image as float32 in [-1, 1]."""
    return image.float() / 127.5 - 1.0


class StepProgress:
    """Progress of a training, with means of what its last `interval` steps measured."""

    def __init__(self, name: str, total: int, interval: int, start: int = 0) -> None:
        self._total, self._interval = total, interval
        self._cpu = time.process_time()
        self._sums: dict[str, float] = {}
        self._count = 0
        self._note = ""
        self._progress = Progress(name, "step")
        if start < total:
            self._progress(start, total)

    def update(self, step: int, **values: float) -> None:
        """Adds the values of a finished step (counted from 1)."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._count += 1
        if step % self._interval == 0 or step == self._total:
            means = [f"{key} {value / self._count:.5f}" for key, value in self._sums.items()]
            self._note = " ".join([*means, f"cpu {time.process_time() - self._cpu:.0f}s"])
            self._sums, self._count = {}, 0
        self._progress(step, self._total, self._note)
