"""The image tower: the stock class's features, a given folder's weights, no image at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionModel

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import ModelConfig, RunConfig
from megatron_kosmosg.models.vision_encoder import VisionEncoder, load_tower, tower_config
from tests.support.tiny_models import model_config

SIZES = model_config().vision


@pytest.fixture
def encoder() -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(RunConfig(stage="pretrain", model=ModelConfig(vision=SIZES)))


def test_features_are_the_stock_towers_normed_tokens(encoder: VisionEncoder) -> None:
    images = torch.randn(2, 3, 28, 28)
    stock = CLIPVisionModel(tower_config(SIZES)).eval()
    stock.load_state_dict(encoder.tower.state_dict())
    tokens = stock(images).last_hidden_state
    expected = F.normalize(stock.post_layernorm(tokens), dim=-1)
    torch.testing.assert_close(encoder(images), expected)
    torch.testing.assert_close(encoder(images).norm(dim=-1), torch.ones(2, 5))


def test_no_image_gives_trainable_parameters_a_zero_gradient(encoder: VisionEncoder) -> None:
    encoder.requires_grad_(False)
    for module in encoder.trainable_modules(1):
        module.requires_grad_(True)
    features = encoder(torch.zeros(0, 3, 28, 28))
    assert features.shape == (0, 5, 16)
    features.sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name
    assert encoder.tower.encoder.layers[1].mlp.fc1.weight.grad is None
    assert encoder.tower.encoder.layers[2].mlp.fc1.weight.grad is not None


def with_last_block_to_train(encoder: VisionEncoder) -> VisionEncoder:
    encoder.requires_grad_(False)
    for module in encoder.trainable_modules(1):
        module.requires_grad_(True)
    return encoder


def gradients(encoder: VisionEncoder, features: torch.Tensor) -> list[torch.Tensor]:
    trained = [each for each in encoder.parameters() if each.requires_grad]
    return list(torch.autograd.grad(features.square().mul(features).sum(), trained))


def test_what_was_begun_goes_on_to_the_same_features_and_gradients(encoder: VisionEncoder) -> None:
    with_last_block_to_train(encoder)
    images = torch.randn(2, 3, 28, 28)
    plain = encoder(images)
    blocks: list[int] = []
    for number, block in enumerate(encoder.tower.encoder.layers):
        block.register_forward_hook(lambda *_, number=number: blocks.append(number))
    begun = encoder.begin(images)
    assert encoder.has_begun(begun) and blocks == [0, 1]
    continued = encoder(begun)
    assert blocks == [0, 1, 2], "the frozen blocks ran once"
    assert torch.equal(continued, plain)
    for found, expected in zip(
        gradients(encoder, continued), gradients(encoder, plain), strict=True
    ):
        assert torch.equal(found, expected)
    assert not encoder.has_begun(begun), "nothing is kept behind its use"
    assert torch.equal(encoder(begun), plain)


def test_what_was_begun_waits_while_other_images_are_encoded(encoder: VisionEncoder) -> None:
    with_last_block_to_train(encoder)
    images, others = torch.randn(2, 2, 3, 28, 28)
    expected = encoder(images), encoder(others)
    begun = encoder.begin(images)
    assert torch.equal(encoder(others), expected[1])
    assert encoder.has_begun(begun)
    assert torch.equal(encoder(begun), expected[0])


def test_blocks_behind_one_that_trains_are_not_frozen(encoder: VisionEncoder) -> None:
    assert encoder.frozen_blocks() == []
    encoder.requires_grad_(False)
    assert len(encoder.frozen_blocks()) == len(encoder.tower.encoder.layers)
    next(encoder.tower.encoder.layers[1].parameters()).requires_grad_(True)
    assert encoder.frozen_blocks() == list(encoder.tower.encoder.layers)[:1]
    encoder.tower.embeddings.requires_grad_(True)
    assert encoder.frozen_blocks() == []


def test_folder_fills_every_weight(encoder: VisionEncoder, tmp_path: Path) -> None:
    saved = CLIPVisionModel(tower_config(SIZES))
    saved.save_pretrained(tmp_path)
    load_tower(encoder, dataclasses.replace(SIZES, path=str(tmp_path)))
    for name, value in saved.state_dict().items():
        assert torch.equal(encoder.tower.state_dict()[name], value), name


def test_folder_of_another_size_is_refused(encoder: VisionEncoder, tmp_path: Path) -> None:
    CLIPVisionModel(tower_config(dataclasses.replace(SIZES, num_layers=2))).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match="num_hidden_layers=2.*set model.vision.num_layers=2"):
        load_tower(encoder, dataclasses.replace(SIZES, path=str(tmp_path)))


def test_folder_without_a_tower_is_named(encoder: VisionEncoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no config.json"):
        load_tower(encoder, dataclasses.replace(SIZES, path=str(tmp_path)))
