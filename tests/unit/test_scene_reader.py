"""the evaluator against images of known truth: true, noisy, recoloured, through the codec."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import pytest
import torch

from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.evaluation.scene_reader import compare, hue_of, read_scenes, summarise
from megatron_kosmosg.toy.world import Scene, render_batch, sample_scene

COUNT = 96


def scenes(number: int, heldout: bool, count: int = COUNT) -> list[Scene]:
    return [sample_scene((21, number, i), number, heldout) for i in range(count)]


def judged(images: torch.Tensor, truths: list[Scene]) -> dict[str, float]:
    seen = read_scenes(images, [len(scene.entities) for scene in truths])
    return summarise([compare(*pair) for pair in zip(seen, truths, strict=True)])


def test_hues_are_those_of_the_standard_library():
    for hue in range(0, 360, 7):
        colour = torch.tensor(colorsys.hsv_to_rgb(hue / 360, 0.6, 0.8)) * 2 - 1
        assert hue_of(colour) == pytest.approx(hue, abs=1e-3)
    assert hue_of(torch.zeros(3)) == 0.0


@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_true_images_are_read_right(number, heldout):
    truths = scenes(number, heldout)
    for noise, limit in ((0.0, 2.0), (0.1, 2.5)):
        images = render_batch(truths)
        images = images + noise * torch.randn(
            images.shape, generator=torch.Generator().manual_seed(0)
        )
        result = judged(images, truths)
        assert result["shape"] >= 0.99 and result["pattern"] >= 0.99, result
        assert result["hue_mean"] < limit and result["background_hue_mean"] < limit, result
        assert result["background_word"] >= 0.95 and result["colour_word"] >= 0.95, result


def test_mixed_counts_keep_their_order():
    truths = [scene for i in range(5) for scene in (scenes(1, True, 5)[i], scenes(2, True, 5)[i])]
    assert judged(render_batch(truths), truths)["shape"] == 1.0


def test_another_image_is_judged_wrong():
    truths = scenes(1, True, 64)
    result = judged(render_batch(truths[1:] + truths[:1]), truths)
    assert result["all"] < 0.2 and result["hue_mean"] > 45


def test_errors_are_the_turn_that_was_made():
    truths = scenes(2, False, 24)
    turned = [
        replace(
            scene,
            entities=tuple(
                replace(e, hue_a=(e.hue_a + 25) % 360, hue_b=(e.hue_b + 25) % 360)
                for e in scene.entities
            ),
            background_hue=(scene.background_hue + 80) % 360,
        )
        for scene in truths
    ]
    result = judged(render_batch(turned), truths)
    assert result["hue_median"] == pytest.approx(25, abs=2)
    assert result["hue_b_median"] == pytest.approx(25, abs=3)
    assert result["background_hue_median"] == pytest.approx(80, abs=2)
    assert result["background_word"] == 0.0


def test_exchanged_entities_are_seen():
    truths = scenes(2, False, 24)
    exchanged = [
        replace(
            scene,
            entities=tuple(
                replace(other, x=e.x, y=e.y, radius=e.radius)
                for e, other in zip(scene.entities, scene.entities[::-1], strict=True)
            ),
        )
        for scene in truths
    ]
    assert judged(render_batch(exchanged), exchanged)["shape"] == 1.0
    assert judged(render_batch(exchanged), truths)["all"] < 0.3


def test_wrong_arguments_are_named():
    images = render_batch(scenes(1, False, 2))
    with pytest.raises(ValueError, match="counts of entities"):
        read_scenes(images, [1])
    with pytest.raises(ValueError, match=r"\[3\]"):
        read_scenes(images, [3, 3])


@pytest.mark.skipif(
    not (assets.path() / "stable-diffusion" / "vae").is_dir(), reason="no toy image codec shipped"
)
@pytest.mark.parametrize("number", [1, 2])
def test_the_codec_keeps_hues_within_two_degrees(number):
    from diffusers import AutoencoderKL

    codec = AutoencoderKL.from_pretrained(
        assets.path() / "stable-diffusion" / "vae", torch_dtype=torch.float32
    ).eval()
    truths = scenes(number, True)
    with torch.no_grad():
        latents = codec.encode(render_batch(truths)).latent_dist.mode()
        result = judged(codec.decode(latents).sample, truths)
    assert result["hue_mean"] < 2.0 and result["shape"] >= 0.99 and result["pattern"] >= 0.97
