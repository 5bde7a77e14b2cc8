"""DALI on one CUDA device ("mixed" decoding) against Pillow. Without a GPU it is skipped.

Mostly PNG: the JPEG decoders of GPUs round differently from the CPU's.
"""

from __future__ import annotations

import numpy as np
import pytest

from megatron_kosmosg.data.images import TOLERANCE, ImageDecoder
from megatron_kosmosg.data.samples import EntityImage
from tests.support.data_helpers import encode_image, noise_image
from tests.support.image_cases import CLIP, SIZES, VAE, levels, needs_dali
from tests.support.image_files import image_files

pytestmark = [pytest.mark.gpu, needs_dali]


@pytest.mark.parametrize("transform", [CLIP, VAE], ids=["clip", "vae"])
def test_gpu_decoding_equals_pillow_within_the_stated_tolerance(transform):
    mask = np.zeros(SIZES[3], np.uint8)
    mask[10:40, 20:50] = 255
    masked = EntityImage(noise_image(3, *SIZES[3]), encode_image(mask))
    images = [*(noise_image(i, *size) for i, size in enumerate(SIZES)), masked]
    decoders = ImageDecoder("pillow"), ImageDecoder("dali", device_id=0)
    a, b = (levels(decoder.decode(images, transform), transform) for decoder in decoders)
    mean, largest = np.abs(a - b).mean(axis=(1, 2, 3)), np.abs(a - b).max(axis=(1, 2, 3))
    assert mean.max() <= TOLERANCE[0] and largest.max() <= TOLERANCE[1]


@pytest.mark.parametrize("name", image_files())
def test_every_format_is_read_or_refused_on_the_gpu_as_everywhere(name):
    """JPEG within the rounding of another decoder."""
    data = image_files()[name].data
    pixels, bad = ImageDecoder("dali", device_id=0).try_decode([data], CLIP)
    if image_files()[name].refused is not None:
        assert image_files()[name].refused in bad[0].reason
        return
    expected = levels(ImageDecoder("pillow").decode([data], CLIP), CLIP)
    assert not bad
    assert np.abs(levels(pixels, CLIP) - expected).mean() <= (1.5 if "JPEG" in name else 0.5)


def test_a_bad_image_on_the_gpu_costs_one_image():
    decoder = ImageDecoder("dali", device_id=0)
    good = [noise_image(i, 30, 40) for i in range(3)]
    expected = decoder.decode(good, CLIP)
    pixels, bad = decoder.try_decode([*good, b"no picture"], CLIP)
    assert [error.index for error in bad] == [3]
    assert np.array_equal(pixels[:3], expected) and not pixels[3].any()
