"""DALI on one CUDA device ("mixed" decoding) against Pillow. Without a GPU it is skipped.

Mostly PNG: the JPEG decoders of GPUs round differently from the CPU's. One decoder for all: each
builds pipelines of its own for every transform, which is most of the time of such a test.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from megatron_kosmosg.data.images import TOLERANCE, ImageDecoder
from megatron_kosmosg.data.samples import EntityImage
from tests.support.data_helpers import encode_image, noise_image
from tests.support.image_cases import CLIP, SIZES, VAE, levels, needs_dali
from tests.support.image_files import image_files

pytestmark = [pytest.mark.gpu, needs_dali]


@functools.cache
def dali() -> ImageDecoder:
    return ImageDecoder("dali", device_id=0)


@pytest.mark.parametrize("transform", [CLIP, VAE], ids=["clip", "vae"])
def test_gpu_decoding_equals_pillow_within_the_stated_tolerance(transform):
    mask = np.zeros(SIZES[3], np.uint8)
    mask[10:40, 20:50] = 255
    masked = EntityImage(noise_image(3, *SIZES[3]), encode_image(mask))
    images = [*(noise_image(i, *size) for i, size in enumerate(SIZES)), masked]
    decoders = ImageDecoder("pillow"), dali()
    a, b = (levels(decoder.decode(images, transform), transform) for decoder in decoders)
    mean, largest = np.abs(a - b).mean(axis=(1, 2, 3)), np.abs(a - b).max(axis=(1, 2, 3))
    assert mean.max() <= TOLERANCE[0] and largest.max() <= TOLERANCE[1]


@pytest.mark.parametrize("name", image_files())
def test_every_format_is_read_or_refused_on_the_gpu_as_everywhere(name):
    """JPEG within the rounding of another decoder."""
    data = image_files()[name].data
    pixels, bad = dali().try_decode([data], CLIP)
    if image_files()[name].refused is not None:
        assert image_files()[name].refused in bad[0].reason
        return
    expected = levels(ImageDecoder("pillow").decode([data], CLIP), CLIP)
    assert not bad
    assert np.abs(levels(pixels, CLIP) - expected).mean() <= (1.5 if "JPEG" in name else 0.5)


def test_a_bad_image_on_the_gpu_costs_one_image():
    decoder = dali()
    good = [noise_image(i, 30, 40) for i in range(3)]
    expected = decoder.decode(good, CLIP)
    pixels, bad = decoder.try_decode([*good, b"no picture"], CLIP)
    assert [error.index for error in bad] == [3]
    assert torch.equal(pixels[:3].cpu(), expected.cpu()) and not pixels[3].any()


def test_images_stay_where_they_are_decoded_and_are_whole():
    """Also while the device is busy, and when memory of earlier ones is used again."""
    decoder = dali()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = [noise_image(i, 30, 40) for i in range(70)]  # more than one run of a pipeline
    expected = ImageDecoder("pillow").try_levels(files, CLIP)[0].float()
    matrix = torch.ones(2048, 2048, device=device)
    sums = []
    for _ in range(4):
        pixels, bad = decoder.try_levels(files, CLIP)
        assert pixels.device.type == device.type and not bad
        matrix = matrix @ matrix * 2.0**-11
        sums.append((pixels * matrix[0, 0]).float())
        del pixels
    for found in sums:
        difference = (found.cpu() - expected).abs()
        assert difference.mean() <= TOLERANCE[0] and difference.max() <= TOLERANCE[1]


def test_a_list_with_a_bad_image_comes_to_the_cpu():
    decoder = dali()
    pixels, bad = decoder.try_levels([noise_image(0, 30, 40), b"no picture"], CLIP)
    assert pixels.device.type == "cpu" and len(bad) == 1
