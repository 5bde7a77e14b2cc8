"""What decoder ranks and score ranks say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from megatron_kosmosg.data.samples import Split


class Kind(IntEnum):
    """The kinds of work that a decoder rank asks for."""

    GRADIENT = 0
    """Loss, and its gradient by the condition."""
    LOSS = 1
    """Loss alone."""
    IMAGES = 2
    """Images drawn from the condition, whose last row is the null condition."""


@dataclass(frozen=True)
class Rows:
    """The samples of a request: all that a score rank needs to read their targets."""

    positions: tuple[int, ...]
    """In their stream."""
    replacements: tuple[int, ...]
    """Replacement indices of the rows (samples.ImageStream); zeros for images."""
    is_heldout: bool = False
    """Whether the positions are of the held-out stream."""

    @property
    def split(self) -> Split:
        return "heldout" if self.is_heldout else "train"


@dataclass(frozen=True)
class ScoreRequest:
    """A question to a score rank, whole in itself: any rank may answer it, twice, or later."""

    kind: Kind
    rows: Rows
    condition: torch.Tensor
    """[rows, c, d] on the host, in the dtype the U-Net runs in."""
    scale: torch.Tensor
    """Loss scale of the optimizer, fp32 scalar on the host."""
    image_size: int = 0
    """Of PICTURES: pixels per side."""

    @property
    def num_values(self) -> int:
        """Number of values in the payload of its answer."""
        if self.kind is Kind.IMAGES:
            return len(self.rows.positions) * 3 * self.image_size**2
        return self.condition.numel() if self.kind is Kind.GRADIENT else 0


@dataclass(frozen=True)
class Answer:
    """What a score rank computed for a request."""

    loss: float
    """Sum over the rows."""
    bad_samples: int
    """Targets that could not be decoded: images that do not count."""
    signal: int
    """Number of the stop signal that the score rank got, 0 for none."""
    idle: float
    """Seconds that the score rank waited for this request."""
    seconds: float
    """That it worked on it."""
    payload: torch.Tensor
    """Flat fp32 on the host: gradient of the unscaled loss, or pixels."""
    waiting: int = 0
    """Requests of any replica that wait for the score rank."""
