"""Outputs, losses and gradients equal those of the authors' released code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from megatron_kosmosg.config.schema import (
    AlignerConfig,
    DecoderConfig,
    ModelConfig,
    ResamplerConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel import platform
from tests.parity.authors_names import from_authors

GOLDEN = Path(__file__).parent.parent / "golden"
IGNORED = {  # buffers without influence, and the tied copy of the embedding
    "gpt_model.decoder.embed_positions._float_tensor",
    "gpt_model.decoder.self_attn_sope.scale",
    "gpt_model.decoder.output_projection.weight",
}


@pytest.fixture(scope="module", params=[1, 2])
def golden(request) -> dict:
    torch.set_num_threads(1)
    return torch.load(GOLDEN / f"official_tiny_{request.param}.pt", weights_only=True)


@pytest.fixture(scope="module")
def model(golden) -> KosmosG:
    """Our model with the authors' weights, every one of which is used exactly once."""
    config = _config(golden["sizes"], golden["vocab_size"])
    layout = platform.initialize(config)
    model = KosmosG(config, layout, output_head=True, aligner_parts=("M", "N")).eval()
    used = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value, names = from_authors(
                name, parameter.shape, golden["model"], _heads(name, golden["sizes"])
            )
            assert value.shape == parameter.shape, name
            parameter.copy_(value)
            used += names
    assert sorted(used) == sorted(golden["model"].keys() - IGNORED)
    yield model
    platform.teardown()


@pytest.fixture
def output(model, golden) -> dict[str, torch.Tensor]:
    model.zero_grad()
    inputs = golden["inputs"]
    return model(inputs["tokens"], inputs["image_slots"], inputs["tokens"] == 1, inputs["images"])


def _config(sizes: dict, vocab_size: int) -> RunConfig:
    return RunConfig(
        stage="pretrain",
        model=ModelConfig(
            vocab_size=vocab_size,
            decoder=DecoderConfig(
                num_layers=sizes["layers"],
                hidden_size=sizes["hidden"],
                ffn_hidden_size=sizes["ffn"],
                num_attention_heads=sizes["heads"],
            ),
            vision=VisionConfig(
                num_layers=sizes["vis_layers"],
                hidden_size=sizes["vis_width"],
                ffn_hidden_size=4 * sizes["vis_width"],
                num_attention_heads=sizes["vis_heads"],
                image_size=sizes["image"],
                patch_size=sizes["patch"],
            ),
            # The released code gives the resampler as many heads as the decoder.
            resampler=ResamplerConfig(
                num_latent_queries=sizes["latents"], num_attention_heads=sizes["heads"]
            ),
            aligner=AlignerConfig(
                num_layers=sizes["al_layers"],
                hidden_size=sizes["al_dim"],
                ffn_hidden_size=sizes["al_ffn"],
                num_attention_heads=sizes["al_heads"],
                num_queries=sizes["cond_tokens"],
                max_positions=sizes["max_pos"],
            ),
        ),
        training=TrainingConfig(precision="fp32"),
    )


def _heads(name: str, sizes: dict) -> int:
    return sizes["al_heads"] if name.startswith("aligner") else sizes["heads"]


def test_image_features(model, golden) -> None:
    with torch.no_grad():
        features = model.resampler(model.vision_encoder(golden["inputs"]["images"]))
    _close(features.flatten(0, 1), golden["outputs"]["image_features"])


@pytest.mark.parametrize("key", ["hidden", "condition"])
def test_states(output, golden, key: str) -> None:
    _close(output[key], golden["outputs"][key])


def test_logits(output, golden) -> None:
    logits = output["logits"].transpose(0, 1)
    size = golden["vocab_size"]
    _close(logits[..., :size], golden["outputs"]["logits"])
    assert torch.all(logits[..., size:] == float("-inf"))


def test_align_losses_and_gradients(model, output, golden) -> None:
    wanted = golden["outputs"]
    hidden = output["hidden"].detach()
    mse = (output["condition"] - golden["inputs"]["clip_embed"]).square().mean()
    scale = 77 / hidden.shape[1]  # a literal 77 in their code, whatever the number of queries
    rec = scale * (output["reconstruction"] - hidden).square().mean()
    _close(mse, wanted["mse_loss"])
    _close(rec, wanted["rec_loss"])
    (mse + rec).backward()
    _compare_gradients(model, wanted["align_grads"], ("aligner_m.", "aligner_n."), golden)


def test_denoising_loss_and_gradients(model, output, golden) -> None:
    unet = UNet2DConditionModel(**golden["unet_config"]).eval().requires_grad_(False)
    unet.load_state_dict(golden["unet"])
    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    inputs = golden["inputs"]
    noisy = schedule.add_noise(inputs["latents"], inputs["noise"], inputs["timesteps"])
    predicted = unet(noisy, inputs["timesteps"], output["condition"]).sample
    loss = (predicted - inputs["noise"]).square().mean(dim=(1, 2, 3)).sum()
    _close(loss, golden["outputs"]["diff_loss"])
    loss.backward()
    prefixes = ("embedding.", "decoder.", "resampler.")
    _compare_gradients(model, golden["outputs"]["diff_grads"], prefixes, golden)


def _compare_gradients(model, theirs: dict, prefixes: tuple[str, ...], golden: dict) -> None:
    used = []
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, parameter in model.named_parameters():
        if not name.startswith(prefixes):
            continue
        wanted, names = from_authors(name, parameter.shape, theirs, _heads(name, golden["sizes"]))
        used += names
        # The gradient of a lone query or key bias may vanish but for rounding.
        scale = max(wanted.abs().max(), 1e-3 * largest)
        error = (parameter.grad - wanted).abs().max() / scale
        assert error < 1e-4, f"{name}: gradient off by {error:.1e} of its maximum"
    assert sorted(used) == sorted(theirs.keys() - IGNORED)


def _close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    error = (got.detach() - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-5, f"off by {error:.1e} of the maximum"
