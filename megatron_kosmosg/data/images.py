"""Encoded images -> tensors of bytes, with DALI or, where it has no wheel, with Pillow.

Shorter side to `size` (antialiased), centre crop, then /255 and normalise, as the authors'
torchvision transforms do (rounding of sizes and offsets included). Batches carry the bytes and are
normalised on the device that computes with them. Pixels are those of image_reading.py, for
both backends within TOLERANCE.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.data.image_reading import SPECIFICATION, read_image
from megatron_kosmosg.data.image_types import (
    Backend,
    BadImage,
    Encoded,
    ImageTransform,
    decoding_reason,
)
from megatron_kosmosg.data.normalise import normalise
from megatron_kosmosg.data.samples import EntityImage
from megatron_kosmosg.launcher import find_rank_info

logger = logging.getLogger(__name__)

TOLERANCE = (0.5, 16.0)
"""Mean and largest difference between the backends in levels of 255, before normalisation, per
image; the largest falls to 3 where an image shrinks less than twofold."""
LONGEST_STRIP = 4
"""Sides to one another; of a longer image only the part that is kept is resized."""
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class PillowBackend:
    """Decodes one image after the other on the CPU, step by step as the authors' torchvision
    does."""

    def decode(self, images: Sequence[Encoded], transform: ImageTransform) -> Tensor:
        """The decoded images, uint8 [n, 3, size, size]. Raises what Pillow raises."""
        pixels = np.stack([_resize_and_crop(read_image(image), transform) for image in images])
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def _resize_and_crop(image: Image.Image, transform: ImageTransform) -> np.ndarray:
    """The image resized and cropped as `transform` says, uint8 [size, size, 3]."""
    size, method = transform.size, _FILTERS[transform.interpolation]
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(width, height) > LONGEST_STRIP * size:
        # What is cut off would be most of the work, and of the memory. The same pixels but for
        # rounding: the box has single precision.
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return np.asarray(image.resize((size, size), method, box))
    image = image.resize((width, height), method)
    return np.asarray(image.crop((left, top, left + size, top + size)))


class BrokenDecoder(ConfigError):
    """A library that cannot decode even the package's own images, for any reason of its own."""

    def __init__(self, backend: str, device_id: int | None, reason: str) -> None:
        other = "pillow" if backend == "dali" else "dali"
        place = "the CPU" if device_id is None else f"CUDA device {device_id}"
        self.reason = f"it fails on {place} on an image known to be good: {reason}"
        super().__init__(
            f"data.image_backend={backend} does not work on {place}, it fails on an image known "
            f"to be good: {reason}; repair its installation or set data.image_backend={other}"
        )


class ImageDecoder:
    """Decodes lists of images; may be called from several threads.

    A library that does not work must not look like a dataset full of bad images. So it decodes
    images known to be good when it is set up and after every failure; BrokenDecoder otherwise.
    """

    def __init__(
        self, backend: Literal["auto", "dali", "pillow"], device_id: int | None = None
    ) -> None:
        """Chooses what decodes; "auto" takes DALI where it works. Raises ConfigError where "dali"
        was asked for and is not installed.

        Args:
            device_id: CUDA device on which DALI decodes; None decodes on the CPU.
        """
        self._pillow: Backend = PillowBackend()
        self._has_warned = False
        self._device_id = device_id
        has_dali = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
        if backend == "dali" and not has_dali:
            raise ConfigError(
                "data.image_backend=dali, but nvidia-dali is not installed; install the "
                "`data` extra or set data.image_backend=pillow"
            )
        if backend == "auto":
            if has_dali and self._could_take_dali():
                return
            backend = "pillow"
        self._take(backend)

    def _could_take_dali(self) -> bool:
        """False, and one line a node, for a DALI that is installed and cannot start."""
        try:
            self._take("dali")
        except BrokenDecoder as error:
            if find_rank_info().local_rank == 0:
                _warn_once("DALI is installed and not used, Pillow decodes: %s", error.reason)
            return False
        return True

    def _take(self, backend: Literal["dali", "pillow"]) -> None:
        self.name = backend
        self._backend: Backend = self._pillow
        if backend == "dali":
            try:
                from megatron_kosmosg.data.images_dali import DaliBackend
            except (ImportError, OSError) as error:
                raise BrokenDecoder(backend, self._device_id, _reason(error)) from error

            self._backend = DaliBackend(self._device_id, self._pillow)
        self._require_working(
            ImageTransform(_KNOWN_SIZE, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        )

    def decode(self, images: Sequence[Encoded], transform: ImageTransform) -> Tensor:
        """The images as float32 [n, 3, size, size], normalised; n may be 0. Raises BadImage for
        the first bad one."""
        pixels, bad = self.try_decode(images, transform)
        if bad:
            raise bad[0]
        return pixels

    def try_decode(
        self, images: Sequence[Encoded], transform: ImageTransform
    ) -> tuple[Tensor, list[BadImage]]:
        """The images as float32 [n, 3, size, size], normalised, with zeros where one is bad; and
        the bad ones."""
        levels, bad = self.try_levels(images, transform)
        pixels = normalise(levels, transform)
        pixels[[error.index for error in bad]] = 0
        return pixels, bad

    def try_levels(
        self, images: Sequence[Encoded], transform: ImageTransform
    ) -> tuple[Tensor, list[BadImage]]:
        """The images as uint8 [n, 3, size, size], not normalised, n may be 0; and the bad ones,
        each of which is blank there: of the levels next to `transform.mean`.

        They are on the GPU that decoded them, whole and for the default stream, or on the CPU; a
        list with an image that the library cannot decode comes to the CPU.
        """
        shape = (len(images), 3, transform.size, transform.size)
        if not images:
            return torch.zeros(shape, dtype=torch.uint8), []
        try:
            return self._backend.decode(images, transform), []
        except Exception:  # noqa: BLE001 - the library fails a whole batch; found one by one below
            blank = (np.array(transform.mean) * 255).round().astype(np.uint8)
            pixels, bad = torch.from_numpy(blank)[:, None, None].expand(shape).clone(), []
            for i, image in enumerate(images):
                try:
                    pixels[i] = self._decode_one(image, transform)
                except Exception as error:  # noqa: BLE001 - any failure means: this image is bad
                    bad.append(BadImage(i, _reason(error)))
            self._require_working(transform)
            return pixels, bad

    def _decode_one(self, image: Encoded, transform: ImageTransform) -> Tensor:
        """Decodes one image, uint8 [3, size, size] on the CPU. Whatever the backend, an image is
        bad only if Pillow cannot read it, for Pillow's reason."""
        try:
            return self._backend.decode([image], transform)[0].cpu()
        except Exception as error:
            if self._backend is self._pillow:
                raise
            pixels = self._pillow.decode([image], transform)[0]
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "an image that Pillow reads and %s does not is taken from Pillow, and others "
                    "like it without a line: %s",
                    *(self.name, _reason(error)),
                )
            return pixels

    @property
    def description(self) -> str:
        """What decodes, for what is kept of its pixels."""
        place = "" if self._device_id is None else " on a GPU"
        return f"{self.name}{place}, image reading {SPECIFICATION}"

    def _require_working(self, transform: ImageTransform) -> None:
        """Raises BrokenDecoder unless known images are decoded and have their colour."""
        try:
            pixels = self._backend.decode(_known_good(), transform).cpu()
        except Exception as error:  # noqa: BLE001 - libraries raise what they like
            raise BrokenDecoder(self.name, self._device_id, _reason(error)) from error
        colour = torch.tensor(_KNOWN_COLOUR, dtype=torch.float32)[:, None, None]
        if not bool(((pixels - colour).abs() <= TOLERANCE[1]).all()):
            raise BrokenDecoder(self.name, self._device_id, "its pixels are wrong")


_KNOWN_SIZE, _KNOWN_COLOUR = 16, (200, 100, 50)


@cache
def _known_good() -> tuple[Encoded, ...]:
    """One image of a single colour for each way through a backend: JPEG, PNG, and one with a
    mask."""
    side = (_KNOWN_SIZE, _KNOWN_SIZE)
    jpeg, png, mask = io.BytesIO(), io.BytesIO(), io.BytesIO()
    image = Image.new("RGB", side, _KNOWN_COLOUR)
    image.save(jpeg, "JPEG")
    image.save(png, "PNG")
    Image.new("L", side, 255).save(mask, "PNG")
    masked = EntityImage(png.getvalue(), mask.getvalue())
    return jpeg.getvalue(), png.getvalue(), masked


@cache
def _warn_once(message: str, *values: str) -> None:
    """A process opens several decoders, and each thread of a stream asks them."""
    logger.warning(message, *values)


def _reason(error: Exception) -> str:
    """A library's error in one line."""
    return decoding_reason(error)
