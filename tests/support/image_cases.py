"""Transforms, sizes and decoders that the image tests go through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_kosmosg.data.image_types import ImageTransform

CLIP = ImageTransform(
    24, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
VAE = ImageTransform(40, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIZES = [(24, 24), (33, 47), (47, 33), (64, 64), (100, 257), (225, 301), (40, 41)]

try:
    import nvidia.dali  # noqa: F401 - whether it is there

    BACKENDS = ["pillow", "dali"]
except ImportError:
    BACKENDS = ["pillow"]
needs_dali = pytest.mark.skipif(len(BACKENDS) == 1, reason="nvidia-dali is not installed")


def levels(pixels: torch.Tensor, transform: ImageTransform) -> np.ndarray:
    """Back to 0..255, [n, H, W, 3]."""
    mean, std = (np.array(v)[:, None, None] for v in (transform.mean, transform.std))
    return ((pixels.cpu().numpy() * std + mean) * 255).transpose(0, 2, 3, 1)
