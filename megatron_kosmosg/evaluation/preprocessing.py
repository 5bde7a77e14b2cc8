"""How each reference protocol makes a network's input of an image file, to the pixel.

A score depends on nothing as much as on this: protocols differ in the filter that resizes, in
whether it smooths, in how half a pixel of a crop is rounded and in how values become bytes. Images
are read as the protocols read them, `convert("RGB")` of what is stored: EXIF turns nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.image_reading import load_pixels, open_image
from megatron_kosmosg.data.image_types import UnreadableImage
from megatron_kosmosg.foreign_files import read_file

DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
INCEPTION_SIDE = 299
MAX_ASPECT = 100
"""Of an image that is scored: its short side is scaled to a fixed length, the other with it."""

PixelRule = Callable[[Image.Image], torch.Tensor]
"""float32 [3, side, side] of an RGB image."""


def read_rgb(path: Path) -> Image.Image:
    """RGB of an image file, not turned. Raises InputError that names it."""
    try:
        data = read_file(path)
        image = open_image(data)
        load_pixels(image, data)
    except FileNotFoundError:
        raise InputError(f"no image {path}") from None
    except (OSError, UnreadableImage) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise InputError(
            f"{path} has {image.width} x {image.height} pixels; an image to be scored is at most "
            f"{MAX_ASPECT} times as long as wide"
        )
    return image.convert("RGB")


def dino_pixels(image: Image.Image) -> torch.Tensor:
    """The image as DINO takes it: torchvision's Resize(256, bicubic), CenterCrop(224) and the mean
    and spread of ImageNet."""
    resized = image.resize(short_side_size(image.size, 256), Image.Resampling.BICUBIC)
    return _normalised(_cropped(resized, 224, torchvision_offset), DINO_MEAN, DINO_STD)


def clip_pixels(image: Image.Image) -> torch.Tensor:
    """Hugging Face's CLIPImageProcessor, the one that resizes with Pillow."""
    resized = image.resize(short_side_size(image.size, 224), Image.Resampling.BICUBIC)
    return _normalised(_cropped(resized, 224, transformers_offset), CLIP_MEAN, CLIP_STD)


def short_side_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The (width, height) after resizing such that the shorter one is `side`; the longer one is
    truncated."""
    width, height = size
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def torchvision_offset(length: int, side: int) -> int:
    """The pixel at which torchvision's centre crop begins; half pixels go to the even number."""
    return int(round((length - side) / 2.0))


def transformers_offset(length: int, side: int) -> int:
    """The pixel at which transformers' centre crop begins; half pixels go down."""
    return (length - side) // 2


@dataclass(frozen=True)
class FidProtocol:
    """What the Inception network sees of the real and of the generated images."""

    summary: str
    """For people."""
    real: PixelRule
    generated: PixelRule


def tensorflow_resize(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """TensorFlow 1's bilinear resize of [3, h, w] to [3, side, side]: point i of the output lies at
    i * h / side of the input, without the half pixel that others add, and nothing is smoothed."""
    rows, row_share = _points(pixels.shape[1], side)
    columns, column_share = _points(pixels.shape[2], side)
    next_rows = (rows + 1).clamp(max=pixels.shape[1] - 1)
    next_columns = (columns + 1).clamp(max=pixels.shape[2] - 1)
    upper, lower = pixels[:, rows], pixels[:, next_rows]

    def across(lines: torch.Tensor) -> torch.Tensor:
        left, right = lines[:, :, columns], lines[:, :, next_columns]
        return left + (right - left) * column_share

    top, bottom = across(upper), across(lower)
    return top + (bottom - top) * row_share[:, None]


def _points(length: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The (whole part, remainder) of where the output's points lie in the input."""
    places = torch.arange(side, dtype=torch.float32) * (length / side)
    whole = places.floor()
    return whole.long(), places - whole


def _inception_of_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """The network's input of byte values [3, h, w], as torch-fidelity makes it."""
    return (tensorflow_resize(pixels.float(), INCEPTION_SIDE) - 128) / 128


def _as_stored(image: Image.Image) -> torch.Tensor:
    return _inception_of_bytes(_bytes(image))


def _square_256(image: Image.Image) -> torch.Tensor:
    """The centre crop of the image as torchvision 0.14 resizes a float tensor to 256, which does
    not smooth; torchmetrics' `(x * 255).byte()` truncates."""
    width, height = short_side_size(image.size, 256)
    pixels = (_bytes(image).float() / 255)[None]
    if (height, width) != pixels.shape[2:]:
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
    top, left = torchvision_offset(height, 256), torchvision_offset(width, 256)
    cropped = pixels[0, :, top : top + 256, left : left + 256]
    return _inception_of_bytes((cropped * 255).byte())


def _smooth_256(image: Image.Image) -> torch.Tensor:
    """Pillow's bicubic resize to 256, which smooths, and centre crop."""
    resized = image.resize(short_side_size(image.size, 256), Image.Resampling.BICUBIC)
    return _inception_of_bytes(_bytes(_cropped(resized, 256, torchvision_offset)))


def _clean(image: Image.Image) -> torch.Tensor:
    """Pillow's bicubic resize of each channel as floats: the image is not cut, nothing rounded."""
    planes = [
        np.asarray(
            Image.fromarray(plane).resize(
                (INCEPTION_SIDE, INCEPTION_SIDE), Image.Resampling.BICUBIC
            )
        )
        for plane in np.asarray(image, dtype=np.float32).transpose(2, 0, 1).copy()
    ]
    return (torch.from_numpy(np.stack(planes)) - 128) / 128


FID_PROTOCOLS = {
    "kosmosg-first-run": FidProtocol(
        "KOSMOS-G's script, first run: real images at 256 without smoothing, generated ones in "
        "their own size",
        _square_256,
        _as_stored,
    ),
    "kosmosg-rerun": FidProtocol(
        "KOSMOS-G's script on finished images: both at 256 without smoothing",
        _square_256,
        _square_256,
    ),
    "metaquery": FidProtocol(
        "MetaQuery: both at 256, bicubic with smoothing", _smooth_256, _smooth_256
    ),
    "clean-fid": FidProtocol(
        "clean-fid: both at 299, bicubic with smoothing, in floats", _clean, _clean
    ),
}
"""By the name that a result states."""


def _bytes(image: Image.Image) -> torch.Tensor:
    """The image's pixels, uint8 [3, h, w]."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def _cropped(image: Image.Image, side: int, offset: Callable[[int, int], int]) -> Image.Image:
    left, top = offset(image.width, side), offset(image.height, side)
    return image.crop((left, top, left + side, top + side))


def _normalised(
    image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    pixels = _bytes(image).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
