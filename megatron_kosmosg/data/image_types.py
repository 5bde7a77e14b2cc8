"""What a library that decodes pictures is handed and gives back; images.py chooses one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from megatron_kosmosg.data.samples import EntityImage

Encoded = bytes | EntityImage
_OBJECT = re.compile(r"\s*<[\w.]+ object at 0x[0-9a-fA-F]+>")
"""How Python writes an object that has no text of its own."""


def decoding_reason(error: Exception) -> str:
    """What a library said of a picture that it cannot decode, the same in every run: Pillow names
    the buffer that it reads by its address."""
    return _OBJECT.sub("", str(error)).strip() or type(error).__name__


@dataclass(frozen=True)
class ImageTransform:
    """How a picture becomes a tensor; `mean` and `std` in units of [0, 1] pixel values."""

    size: int
    """Pixels per side of the result."""
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class BadImage(ValueError):
    """A picture that cannot be decoded; `index` is its place in the list handed over."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"image {index} cannot be decoded: {reason}")
        self.index = index
        self.reason = reason


class Backend(Protocol):
    """Decodes pictures of one of the libraries."""

    def decode(self, images: Sequence[Encoded], transform: ImageTransform) -> np.ndarray:
        """float32 [n, 3, size, size], n >= 1; raises any exception when one cannot be decoded."""
        ...
