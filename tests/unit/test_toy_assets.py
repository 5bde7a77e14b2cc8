"""The shipped image tower loads where the model loads it; its tokens tell what images show."""

from __future__ import annotations

import pytest
import torch

from megatron_kosmosg.config.schema import ModelConfig, RunConfig, VisionConfig
from megatron_kosmosg.models.vision_encoder import VisionEncoder, load_tower
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.training import clip, clip_probe

TOWER = assets.path() / "clip-vision"


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    vision = VisionConfig(
        path=str(TOWER),
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    encoder = VisionEncoder(RunConfig(stage="pretrain", model=ModelConfig(vision=vision)))
    load_tower(encoder, vision)
    return encoder.eval()


@torch.no_grad()
def test_training_reads_the_tokens_that_the_model_reads(encoder):
    images = clip.pool.images(clip_probe.crops(1, 4, True))
    projected = torch.nn.functional.normalize(clip.tokens(encoder.tower, images), dim=-1)
    stock = encoder(clip.normalise(images))
    torch.testing.assert_close(projected, stock)


def test_a_linear_map_reads_heldout_subjects(encoder):
    found = clip_probe.probe(encoder.tower, mean=False, count=1500, heldout=200)
    assert found.shape >= 0.97 and found.pattern >= 0.95, found
    assert found.hue_median < 6.0, found
