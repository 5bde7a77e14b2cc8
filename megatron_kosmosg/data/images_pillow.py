"""Pictures through Pillow, step by step what the authors' torchvision transforms do."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from megatron_kosmosg.data.images import Encoded, ImageTransform
from megatron_kosmosg.data.samples import EntityImage

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class PillowBackend:
    """One picture after the other, on the CPU."""

    def decode(self, images: Sequence[Encoded], transform: ImageTransform) -> np.ndarray:
        """float32 [n, 3, size, size]; raises what Pillow raises."""
        pixels = np.stack([_resize_and_crop(_open(image), transform) for image in images])
        mean, std = (np.array(v, np.float32) * 255 for v in (transform.mean, transform.std))
        return np.ascontiguousarray(((pixels - mean) / std).transpose(0, 3, 1, 2))


def _open(encoded: Encoded) -> Image.Image:
    if isinstance(encoded, bytes):
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    image = Image.open(io.BytesIO(encoded.image)).convert("RGB")
    return image if encoded.mask is None else paint_background_white(image, encoded)


def paint_background_white(image: Image.Image, encoded: EntityImage) -> Image.Image:
    """`image` where the mask is 255, white where it is 0, mixed in between."""
    assert encoded.mask is not None
    mask = Image.open(io.BytesIO(encoded.mask)).convert("L")
    return Image.composite(image, Image.new("RGB", image.size, (255, 255, 255)), mask)


def _resize_and_crop(image: Image.Image, transform: ImageTransform) -> np.ndarray:
    """float32 [size, size, 3], 0 to 255."""
    size = transform.size
    width, height = (int(size * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), _FILTERS[transform.interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
