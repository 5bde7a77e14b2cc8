"""Images as bytes -> what the image tower and the VAE take, on the device that computes it.

Bytes are a quarter of what has to be copied to a device. On a CPU the numbers are those that the
authors' transforms give; a device divides in single precision, too.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.image_types import ImageTransform


def normalise(pixels: Tensor, transform: ImageTransform) -> Tensor:
    """The images uint8 [n, 3, size, size] as float32 of the same shape, normalised, on their
    device.

    The same on every device: one subtraction and one division in single precision.
    """
    mean, std = _levels(transform, pixels.device)
    return (pixels - mean).div_(std)


@cache
def _levels(transform: ImageTransform, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation as float32 [3, 1, 1] each, in levels of 255. They are made once, because a
    copy to a device waits."""
    mean, std = (
        torch.tensor(values, device=device)[:, None, None] * 255
        for values in (transform.mean, transform.std)
    )
    return mean, std


def normalise_batch(batch: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """The batch with its images normalised; images that are no bytes are so already."""
    transforms = {"pixel_values": prompt_transform, "target_pixel_values": target_transform}
    return batch | {
        name: normalise(batch[name], transform(config))
        for name, transform in transforms.items()
        if name in batch and batch[name].dtype is torch.uint8
    }


def prompt_transform(config: RunConfig) -> ImageTransform:
    """The transform of the images that the image tower sees: bicubic, normalised with CLIP's mean
    and deviation."""
    mean, std = tuple(config.data.image_mean), tuple(config.data.image_std)
    if len(mean) != 3 or len(std) != 3:
        raise ConfigError("data.image_mean and data.image_std need three values each")
    return ImageTransform(config.model.vision.image_size, "bicubic", mean, std)


def target_transform(config: RunConfig) -> ImageTransform:
    """The transform of the images that the VAE encodes."""
    return target_pixels(config.data.target_image_size)


def target_pixels(size: int) -> ImageTransform:
    """The VAE's transform for images of `size` pixels a side: bilinear, levels in [-1, 1]."""
    half = (0.5, 0.5, 0.5)
    return ImageTransform(size, "bilinear", half, half)
