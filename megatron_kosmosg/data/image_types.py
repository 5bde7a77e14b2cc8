"""What a library that decodes images is handed and gives back; images.py chooses one.

Needs no torch: workers of preprocessing start without.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.samples import EntityImage

if TYPE_CHECKING:
    from torch import Tensor

Encoded = bytes | EntityImage
_OBJECT = re.compile(r"\s*<[\w.]+ object at 0x[0-9a-fA-F]+>")
"""How Python writes an object that has no text of its own."""
_TRACEBACK = re.compile(r"which was used in the pipeline definition .*?encountered:\s", re.DOTALL)
_NOT_USED_AGAIN = re.compile(r"Current pipeline object is no longer valid\.")


def decoding_reason(error: Exception) -> str:
    """What a library said of an image that it cannot decode, whole and in one line, the same in
    every run: Pillow names the buffer that it reads by its address, DALI where in our files its
    pipeline was written down."""
    message = str(error)
    for noise in (_OBJECT, _TRACEBACK, _NOT_USED_AGAIN):
        message = noise.sub("", message)
    return " ".join(message.split()) or type(error).__name__


@dataclass(frozen=True)
class ImageTransform:
    """How an image becomes a tensor; `mean` and `std` in units of [0, 1] pixel values, which
    `images.normalise` applies to the levels that are read."""

    size: int
    """Pixels per side of the result."""
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class UnreadableImage(InputError):
    """A file without certain pixels. `reason` goes on after the image's name and has no values, so
    that it can be counted; `detail` has them."""

    def __init__(self, reason: str, detail: str = "", what: str = "image") -> None:
        super().__init__(f"the {what} {reason}{f': {detail}' if detail else ''}")
        self.reason = reason
        self.detail = detail


class BadImage(ValueError):
    """An image that cannot be decoded; `index` is its place in the list handed over."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"image {index} cannot be decoded: {reason}")
        self.index = index
        self.reason = reason


class Backend(Protocol):
    """Decodes images of one of the libraries."""

    def decode(self, images: Sequence[Encoded], transform: ImageTransform) -> Tensor:
        """The decoded images, uint8 [n, 3, size, size], levels 0 to 255, n >= 1, on the CPU or on
        the device that decoded them. Raises any exception when one of them cannot be decoded."""
        ...
