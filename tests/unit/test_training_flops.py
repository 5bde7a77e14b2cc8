"""FLOP formulae against counts that torch's FlopCounterMode gave for independent implementations.

The reference numbers (GFLOP, forward pass, multiply-add = 2) were counted on Hugging Face's
Kosmos-2 and CLIP and on diffusers' Stable Diffusion v1.5 at full size.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.models import flops
from megatron_kosmosg.models.diffusion_flops import (
    CLIP_VIT_L_TEXT,
    diffusion_flops,
    score_flops,
    unet_and_vae,
)

CONFIG = load_config(None, ["stage=instruct", "logging.output_dir=x"])
G = 1e9


@pytest.mark.parametrize(("length", "expected"), [(80, 194.5), (150, 366.8), (300, 742.5)])
def test_decoder(length, expected):
    assert flops.decoder_flops(CONFIG, length, 1) / G == pytest.approx(expected, rel=1e-3)
    assert flops.decoder_flops(CONFIG, 4 * length, 4) == 4 * flops.decoder_flops(CONFIG, length, 1)


def test_head_vision_resampler_and_text_encoder():
    assert flops.head_flops(CONFIG, 150) / G == pytest.approx(39.3, rel=2e-3)
    assert flops.vision_flops(CONFIG, 1) / G == pytest.approx(162.0, rel=1e-3)
    assert flops.resampler_flops(CONFIG, 1) / G == pytest.approx(7.7, rel=3e-3)
    assert flops.clip_text_flops(CONFIG, 1) / G == pytest.approx(13.3, rel=3e-3)
    assert CLIP_VIT_L_TEXT.num_parameters == 123_060_480


def test_last_clip_block_trains():
    images = flops._images(CONFIG, 1) - 3 * flops.resampler_flops(CONFIG, 1)
    assert images / G == pytest.approx(175.5, rel=1e-3)


@pytest.mark.parametrize(("length", "expected"), [(80, 32.0), (150, 46.9), (215, 61.1)])
def test_aligner_m(length, expected):
    assert flops.aligner_m_flops(CONFIG, length, 1) / G == pytest.approx(expected, rel=3e-3)


def test_stable_diffusion_at_512_pixels():
    forward, backward, encode = diffusion_flops(None, 512, 77)
    assert forward / G == pytest.approx(803.3, rel=1e-3)
    assert backward / G == pytest.approx(865.9, rel=1e-3)
    assert encode / G == pytest.approx(1116.7, rel=1e-3)
    cached = score_flops(None, 512, 77, with_vae=False)
    assert cached / G == pytest.approx(1669.2, rel=1e-3)
    unet, vae = unet_and_vae(None)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


def test_a_typical_instruct_sample_costs_what_its_parts_cost():
    """215 positions, two images, cached latents: 2.17 TFLOP of ours and 1.67 of the U-Net."""
    cached = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, latent_cache="x"))
    total = flops.instruct_flops(cached, num_tokens=215, num_images=2, num_targets=1)
    assert total / 1e12 == pytest.approx(2.17 + 1.67, rel=5e-3)


def test_a_transformer_layer_counted_on_real_matrices():
    from torch.utils.flop_counter import FlopCounterMode

    layer = torch.nn.TransformerEncoderLayer(32, 4, 80, batch_first=True, device="meta")
    with FlopCounterMode(display=False) as counter:
        layer.train()(torch.empty(3, 10, 32, device="meta"))
    assert flops._layer(32, 80, num_tokens=30, length=10) == counter.get_total_flops()
