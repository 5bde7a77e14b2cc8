"""The denoising loss against a computation from diffusers' own parts, and what its keys promise."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import ScoreConfig
from megatron_kosmosg.models.diffusion import FrozenDiffusion
from megatron_kosmosg.models.sampler import sample_images
from megatron_kosmosg.parallel.context import single_process_context
from megatron_kosmosg.score.keyed_noise import RandomKey, ScoreNoise
from megatron_kosmosg.score.loss import ColocatedScore, drop_condition
from tests.support.denoising_reference import denoising_errors
from tests.support.tiny_models import (
    CONDITION_WIDTH,
    NUM_QUERIES,
    TARGET_SIZE,
    write_stable_diffusion,
)

SEED = 11
CPU = torch.device("cpu")


@pytest.fixture(params=["epsilon", "sample", "v_prediction"])
def folder(request, tmp_path):
    return write_stable_diffusion(tmp_path, request.param)


def inputs(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(rows, NUM_QUERIES, CONDITION_WIDTH, generator=generator)
    pixels = torch.rand(rows, 3, TARGET_SIZE, TARGET_SIZE, generator=generator) * 2 - 1
    return condition, pixels, torch.tensor([7, 8, 1_000_000])[:rows]


def score(folder, **settings) -> ColocatedScore:
    diffusion = FrozenDiffusion.from_folder(folder, device=CPU, dtype=torch.float32)
    return ColocatedScore(diffusion, single_process_context(CPU), ScoreConfig(**settings), SEED)


def test_loss_is_the_sum_of_per_image_means_as_computed_by_hand(folder):
    condition, pixels, positions = inputs()
    colocated = score(folder)
    loss = colocated(condition, pixels, torch.ones(3), positions, "instruct")
    errors, _ = denoising_errors(folder, SEED, condition, pixels, positions)
    torch.testing.assert_close(loss.double(), errors.sum(), rtol=1e-5, atol=0)
    without = colocated(condition, pixels, torch.tensor([1.0, 0.0, 1.0]), positions, "instruct")
    torch.testing.assert_close(without.double(), errors[[0, 2]].sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", ["min_snr", "capped_snr_plus_one"])
def test_weights_are_those_of_the_latent_error_for_every_prediction_type(folder, weighting):
    condition, pixels, positions = inputs()
    loss = score(folder, loss_weighting=weighting, snr_gamma=4.0)(
        condition, pixels, torch.ones(3), positions, "instruct"
    )
    errors, timesteps = denoising_errors(folder, SEED, condition, pixels, positions)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    alpha = scheduler.alphas_cumprod[timesteps].double()
    snr = alpha / (1 - alpha)
    # error of the latents that the prediction implies, per unit of prediction error
    latent_error = {
        "epsilon": errors * (1 - alpha) / alpha,
        "sample": errors,
        "v_prediction": errors * (1 - alpha),
    }[scheduler.config.prediction_type]
    weight = (snr + (weighting != "min_snr")).clamp(max=4.0)
    torch.testing.assert_close(loss.double(), (weight * latent_error).sum(), rtol=2e-5, atol=0)


def test_gradient_reaches_the_condition_and_no_frozen_parameter(folder):
    condition, pixels, positions = inputs()
    condition.requires_grad_()
    colocated = score(folder)
    colocated(condition, pixels, torch.ones(3), positions, "instruct").backward()
    assert condition.grad.abs().sum(dim=(1, 2)).min() > 0
    diffusion = colocated._denoising._diffusion
    frozen = [*diffusion.unet.parameters(), *diffusion.vae.parameters()]
    assert all(parameter.grad is None for parameter in frozen)


def test_draws_depend_on_position_and_purpose_only():
    key = RandomKey(SEED, "instruct")
    both = key.normal(torch.tensor([4, 9]), "noise", (2, 2))
    torch.testing.assert_close(both[1:], key.normal(torch.tensor([9]), "noise", (2, 2)))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, key.normal(torch.tensor([4, 9]), "posterior", (2, 2)))
    heldout = RandomKey(SEED, "instruct-heldout").normal(torch.tensor([4, 9]), "noise", (2, 2))
    assert not torch.equal(both, heldout)


def test_noise_that_was_drawn_before_gives_the_same_loss(folder):
    condition, pixels, positions = inputs()
    colocated = score(folder)
    arguments = (condition, pixels, torch.ones(3), positions, "instruct")
    diffusion = colocated._denoising._diffusion
    shape = diffusion.latent_shape((TARGET_SIZE, TARGET_SIZE))
    drawn = ScoreNoise(ScoreConfig(), SEED).noise(positions, "instruct", shape, 1000)
    assert torch.equal(colocated(*arguments, drawn), colocated(*arguments))
    drawn["noise"] = -drawn["noise"]
    assert not torch.equal(colocated(*arguments, drawn), colocated(*arguments))


def test_timestep_sampling_power_favours_high_noise():
    uniform = (torch.arange(1000) + 0.5) / 1000
    sampled = ScoreConfig(timestep_sampling="power", timestep_power=0.5)
    plain = ScoreNoise(ScoreConfig(), SEED).timesteps(uniform, 1000)
    power = ScoreNoise(sampled, SEED).timesteps(uniform, 1000)
    assert plain.tolist() == list(range(1000))
    assert power.float().mean() == pytest.approx(1000 * 2 / 3, rel=0.01)


def test_dropped_rows_become_the_null_condition_with_gradient():
    condition = torch.randn(3, 2, 4, requires_grad=True)
    null_condition = torch.randn(1, 2, 4, requires_grad=True)
    mixed = drop_condition(condition, null_condition, torch.tensor([False, True, True]))
    torch.testing.assert_close(mixed[0], condition[0])
    torch.testing.assert_close(mixed[2], null_condition[0])
    mixed.sum().backward()
    assert condition.grad[1:].abs().sum() == 0 and condition.grad[0].min() == 1
    assert null_condition.grad.unique().tolist() == [2.0]


def test_missing_folder_is_named(tmp_path):
    write_stable_diffusion(tmp_path)
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="model.diffusion.path.*'vae'"):
        FrozenDiffusion.from_folder(tmp_path, device=CPU, dtype=torch.float32)


def test_sampler_equals_the_stock_pipeline(tmp_path):
    """Same conditions and start latents through diffusers' StableDiffusionPipeline."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    folder = write_stable_diffusion(tmp_path)
    diffusion = FrozenDiffusion.from_folder(folder, device=CPU, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    condition = torch.randn(2, NUM_QUERIES, CONDITION_WIDTH, generator=generator)
    null_condition = torch.randn(1, NUM_QUERIES, CONDITION_WIDTH, generator=generator)
    noise = torch.randn(2, *diffusion.latent_shape(), generator=generator)
    images = sample_images(
        diffusion, condition, null_condition, noise, num_inference_steps=5, guidance_scale=3.0
    )
    pipeline = StableDiffusionPipeline(
        vae=diffusion.vae,
        unet=diffusion.unet,
        text_encoder=None,
        tokenizer=None,
        scheduler=DPMSolverMultistepScheduler.from_config(diffusion.noise_scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        prompt_embeds=condition,
        negative_prompt_embeds=null_condition.expand_as(condition),
        latents=noise,
        num_inference_steps=5,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    torch.testing.assert_close((images + 1) / 2, stock, rtol=0, atol=1e-5)
