"""What decoder ranks and score ranks say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch


class Kind(IntEnum):
    """What a decoder rank asks for."""

    GRADIENT = 0
    """Loss, and its gradient by the condition."""
    LOSS = 1
    """Loss alone."""
    PICTURES = 2
    """Pictures drawn from the condition, whose last row is the null condition."""
    END = 3
    """Nothing more."""


@dataclass(frozen=True)
class Request:
    """One message to a score rank."""

    kind: Kind
    condition: torch.Tensor
    """[rows, c, d], in the dtype the U-Net runs in; no rows for END."""
    scale: torch.Tensor
    """Loss scale of the optimizer, scalar."""
    positions: torch.Tensor
    """Stream positions, int64 [n]: of the rows, or of the pictures."""
    replacements: torch.Tensor
    """int64 [n]: replacement indices of the rows (samples.PictureStream); zeros for pictures."""
    is_heldout: bool = False
    """Of LOSS and GRADIENT: whether the positions are of the held-out stream."""
    image_size: int = 0
    """Of PICTURES: pixels per side."""
    is_done: bool = False
    """Of END: whether the run reached its last iteration; it was asked to stop otherwise."""


@dataclass(frozen=True)
class Answer:
    """What a score rank computed."""

    loss: torch.Tensor
    """Sum over the rows, fp32 scalar."""
    bad_samples: torch.Tensor
    """Targets that could not be decoded: images that do not count; scalar."""
    signal: torch.Tensor
    """Number of the stop signal that the score rank got, 0 for none; scalar."""
    idle: torch.Tensor
    """Seconds that the score rank waited for this request; scalar."""
    payload: torch.Tensor
    """Flat fp32: gradient of the unscaled loss, or pixels."""


HEAD = 4
"""Numbers before an answer's payload."""


def read_answer(message: torch.Tensor) -> Answer:
    """What `take_answer` received."""
    loss, bad_samples, signal, idle = message[:HEAD].unbind()
    return Answer(loss, bad_samples, signal, idle, message[HEAD:])
