"""Encoded pictures -> normalised tensors, with DALI or, where it has no wheel, with Pillow.

Shorter side to `size` (antialiased), centre crop, /255, normalise, as the authors' torchvision
transforms do (rounding of sizes and offsets included). The backends agree within TOLERANCE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.samples import EntityImage

Encoded = bytes | EntityImage

TOLERANCE = (0.5, 16.0)
"""Mean and largest difference between the backends in levels of 255, before normalisation, per
picture; the largest falls to 3 where a picture shrinks less than twofold."""


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


class ImageDecoder:
    """Decodes lists of pictures; may be called from several threads."""

    def __init__(
        self, backend: Literal["auto", "dali", "pillow"], device_id: int | None = None
    ) -> None:
        """`device_id`: CUDA device on which DALI decodes; None decodes on the CPU."""
        has_dali = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
        if backend == "auto":
            backend = "dali" if has_dali else "pillow"
        if backend == "dali":
            if not has_dali:
                raise ValueError(
                    "data.image_backend=dali, but nvidia-dali is not installed; install the "
                    "`data` extra or set data.image_backend=pillow"
                )
            from megatron_kosmosg.data.images_dali import DaliBackend

            self._backend: Backend = DaliBackend(device_id)
        else:
            from megatron_kosmosg.data.images_pillow import PillowBackend

            self._backend = PillowBackend()
        self.name = backend

    def decode(self, images: Sequence[Encoded], transform: ImageTransform) -> Tensor:
        """float32 [n, 3, size, size]; n may be 0. Raises BadImage for the first bad picture."""
        pixels, bad = self.try_decode(images, transform)
        if bad:
            raise bad[0]
        return pixels

    def try_decode(
        self, images: Sequence[Encoded], transform: ImageTransform
    ) -> tuple[Tensor, list[BadImage]]:
        """float32 [n, 3, size, size], zeros where a picture is bad, and the bad pictures."""
        shape = (len(images), 3, transform.size, transform.size)
        if not images:
            return torch.zeros(shape), []
        try:
            return torch.from_numpy(self._backend.decode(images, transform)), []
        except Exception:  # noqa: BLE001 - the library fails a whole batch; found one by one below
            pixels, bad = np.zeros(shape, np.float32), []
            for i, image in enumerate(images):
                try:
                    pixels[i] = self._backend.decode([image], transform)[0]
                except Exception as error:  # noqa: BLE001 - any failure means: this picture is bad
                    bad.append(
                        BadImage(
                            i,
                            str(error).strip().splitlines()[0]
                            if str(error)
                            else type(error).__name__,
                        )
                    )
            return torch.from_numpy(pixels), bad


def prompt_transform(config: RunConfig) -> ImageTransform:
    """What the vision tower sees: bicubic, normalised with CLIP's mean and deviation."""
    mean, std = tuple(config.data.image_mean), tuple(config.data.image_std)
    if len(mean) != 3 or len(std) != 3:
        raise ValueError("data.image_mean and data.image_std need three values each")
    return ImageTransform(config.model.vision.image_size, "bicubic", mean, std)


def target_transform(config: RunConfig) -> ImageTransform:
    """What the VAE encodes."""
    return target_pixels(config.data.target_image_size)


def target_pixels(size: int) -> ImageTransform:
    """`size` pixels a side, bilinear, in [-1, 1]."""
    half = (0.5, 0.5, 0.5)
    return ImageTransform(size, "bilinear", half, half)
