"""What diffusers users put around Stable Diffusion 1.5 works around KosmosGPipeline."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline
from tests.support.marks import skip_without_group_offload
from tests.support.tiny_models import TARGET_SIZE
from tests.support.tiny_pipeline import draw, prompt_image, tiny_pipeline

DOG = prompt_image(1)
PROMPT = (["A", DOG, "in snow"],)
TEXT_ENCODER_LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_"
PARTS_OF_STABLE_DIFFUSION = ("vae", "unet", "scheduler", "tokenizer")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> KosmosGPipeline:
    torch.set_num_threads(1)
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def pipeline(shared) -> KosmosGPipeline:
    """Its scheduler, U-Net and VAE may be changed freely."""
    parts = dict(shared.components)
    for name in ("scheduler", "unet", "vae"):
        parts[name] = copy.deepcopy(parts[name])
    pipeline = KosmosGPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeddings(pipeline) -> dict[str, torch.Tensor]:
    embeds, negative = pipeline.encode_prompt(*PROMPT)
    return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}


def stable_diffusion_parts(pipeline) -> dict:
    return {
        **{name: getattr(pipeline, name) for name in PARTS_OF_STABLE_DIFFUSION},
        "text_encoder": None,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def test_controlnet(pipeline) -> None:
    torch.manual_seed(2)
    control = ControlNetModel.from_unet(
        pipeline.unet, conditioning_embedding_out_channels=(4, 8), load_weights_from_unet=True
    ).eval()
    with torch.no_grad():  # its outputs start at zero
        for block in control.controlnet_down_blocks:
            block.weight.normal_(std=0.3)
    pose = prompt_image(9, TARGET_SIZE, TARGET_SIZE)
    made = StableDiffusionControlNetPipeline.from_pipe(pipeline, controlnet=control)
    built = StableDiffusionControlNetPipeline(
        **stable_diffusion_parts(pipeline), controlnet=control
    )
    for either in (made, built):
        either.set_progress_bar_config(disable=True)
    found = draw(made, image=pose, **embeddings(pipeline))
    assert torch.equal(found, draw(built, image=pose, **embeddings(pipeline)))
    off = draw(made, image=pose, controlnet_conditioning_scale=0.0, **embeddings(pipeline))
    assert torch.equal(off, draw(pipeline, *PROMPT))
    assert difference(found, off) > 1e-2


def test_image_to_image(pipeline) -> None:
    start = prompt_image(9, TARGET_SIZE, TARGET_SIZE)
    made = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    built = StableDiffusionImg2ImgPipeline(**stable_diffusion_parts(pipeline))
    results = []
    for either in (made, built):
        either.set_progress_bar_config(disable=True)
        settings = {"image": start, "strength": 0.5, "num_inference_steps": 4}
        results.append(draw(either, **settings, **embeddings(pipeline)))
    assert torch.equal(*results)
    assert difference(results[0], draw(pipeline, *PROMPT)) > 1e-2


@pytest.mark.parametrize(
    ("scheduler", "steps"), [(DPMSolverMultistepScheduler, 100), (DDIMScheduler, 250)]
)
def test_the_papers_schedulers(pipeline, scheduler, steps: int) -> None:
    """Dropped in by `from_config`; the same image as stock Stable Diffusion's with them."""
    before = draw(pipeline, *PROMPT)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    count = []
    found = draw(
        pipeline, *PROMPT, num_inference_steps=steps,
        callback_on_step_end=lambda _, step, t, tensors: count.append(t) or tensors,
    )  # fmt: skip
    assert len(count) == steps == len(set(count))
    assert found.isfinite().all() and difference(found, before) > 1e-2
    if scheduler is DPMSolverMultistepScheduler:
        stock = StableDiffusionPipeline(**stable_diffusion_parts(pipeline))
        stock.set_progress_bar_config(disable=True)
        assert torch.equal(draw(stock, num_inference_steps=steps, **embeddings(pipeline)), found)


def test_another_checkpoint_of_the_same_shape(pipeline, tmp_path) -> None:
    torch.manual_seed(11)
    UNet2DConditionModel.from_config(pipeline.unet.config).save_pretrained(tmp_path / "unet")
    pipeline.save_pretrained(tmp_path / "exported")
    other = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    swapped = KosmosGPipeline.from_pretrained(tmp_path / "exported", unet=other)
    swapped.set_progress_bar_config(disable=True)
    before = draw(pipeline, *PROMPT)
    found = draw(swapped, *PROMPT)
    assert difference(found, before) > 1e-2
    pipeline.unet = other
    assert difference(found, draw(pipeline, *PROMPT)) < 1e-5


# LoRA ------------------------------------------------------------------------------------------


@pytest.fixture
def lora(pipeline) -> dict[str, torch.Tensor]:
    """A LoRA of the U-Net's attention, in diffusers' own names."""
    unet = copy.deepcopy(pipeline.unet)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    torch.manual_seed(5)
    state = get_peft_model_state_dict(unet)
    return {f"unet.{name}": 0.5 * torch.randn_like(value) for name, value in state.items()}


def with_text_encoder(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    extra = {f"{TEXT_ENCODER_LAYER}{side}.weight": torch.randn(2, 8) for side in "AB"}
    return {**lora, **extra}


def in_kohyas_names(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The form of most files on model sites: flattened names, an alpha for each layer."""
    state = {}
    for name, value in with_text_encoder(lora).items():
        layer, side = name.removesuffix(".weight").rsplit(".lora_", 1)
        layer = layer.replace("unet.", "lora_unet_", 1).replace("text_encoder.", "lora_te_", 1)
        layer = layer.replace(".", "_")
        state[f"{layer}.lora_{ {'A': 'down', 'B': 'up'}[side] }.weight"] = value
        state[f"{layer}.alpha"] = torch.tensor(2.0)
    return state


def test_a_lora_is_loaded_scaled_fused_and_unloaded(pipeline, lora, tmp_path) -> None:
    save_file(lora, tmp_path / "style.safetensors")
    plain = draw(pipeline, *PROMPT)
    pipeline.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style")
    full = draw(pipeline, *PROMPT)
    assert difference(full, plain) > 1e-3
    assert torch.equal(draw(pipeline, *PROMPT, cross_attention_kwargs={"scale": 0.0}), plain)
    half = draw(pipeline, *PROMPT, cross_attention_kwargs={"scale": 0.5})
    assert 1e-4 < difference(half, plain) and 1e-4 < difference(half, full)
    pipeline.set_adapters("style", 0.5)
    assert difference(draw(pipeline, *PROMPT), half) < 1e-5
    pipeline.fuse_lora()
    assert difference(draw(pipeline, *PROMPT), half) < 1e-4
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    assert difference(draw(pipeline, *PROMPT), plain) < 1e-5


@pytest.mark.parametrize("form", [with_text_encoder, in_kohyas_names])
def test_what_a_lora_says_of_the_text_encoder_is_left_out(pipeline, lora, form, caplog) -> None:
    pipeline.load_lora_weights(lora)
    expected = draw(pipeline, *PROMPT)
    pipeline.unload_lora_weights()
    diffusers_logging.enable_propagation()
    pipeline.load_lora_weights(form(lora))
    diffusers_logging.disable_propagation()
    assert "left out 2 of the LoRA's" in caplog.text and "CLIP's text encoder" in caplog.text
    assert difference(draw(pipeline, *PROMPT), expected) < 1e-5


def test_a_lora_of_the_text_encoder_alone_is_refused(pipeline) -> None:
    plain = draw(pipeline, *PROMPT)
    with pytest.raises(ValueError, match="all 2 tensors .* none the U-Net"):
        pipeline.load_lora_weights(with_text_encoder({}))
    assert torch.equal(draw(pipeline, *PROMPT), plain)


# Memory and precision ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_low_precision(pipeline, tmp_path, dtype, tolerance: float) -> None:
    """Relative to the largest value; loaded in that dtype and cast to it give the same."""
    expected, _ = pipeline.encode_prompt(*PROMPT)
    pipeline.save_pretrained(tmp_path)
    loaded = KosmosGPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    cast = KosmosGPipeline(**copy.deepcopy(pipeline.components)).to(dtype)
    found, negative = loaded.encode_prompt(*PROMPT)
    assert found.dtype == negative.dtype == dtype
    assert difference(found, expected) < tolerance * expected.abs().max().item()
    assert torch.equal(found, cast.encode_prompt(*PROMPT)[0])
    assert draw(loaded, *PROMPT).isfinite().all()


def test_the_language_model_may_have_another_precision(pipeline) -> None:
    """As when only the U-Net is cast; embeddings come in the U-Net's."""
    pipeline.unet.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    embeds, _ = pipeline.encode_prompt(*PROMPT)
    assert embeds.dtype == torch.bfloat16
    assert draw(pipeline, *PROMPT).isfinite().all()


def test_vae_slicing_and_tiling(pipeline) -> None:
    prompts = [PROMPT[0], "a red square"]
    settings = {"height": 2 * TARGET_SIZE, "width": 2 * TARGET_SIZE}
    plain = draw(pipeline, prompts, **settings)
    pipeline.vae.enable_slicing()
    assert difference(draw(pipeline, prompts, **settings), plain) < 1e-5
    pipeline.vae.enable_tiling()
    tiled = draw(pipeline, prompts, **settings)
    assert tiled.shape == plain.shape and tiled.isfinite().all()
    assert 0 < difference(tiled, plain)


@pytest.mark.parametrize("way", ["model", "group"])
def test_offload(pipeline, way: str) -> None:
    """The hooks with the CPU in the accelerator's place; no device memory is measured here.

    enable_sequential_cpu_offload does not take a CPU for it.
    """
    expected = draw(pipeline, *PROMPT)
    parts = KosmosGPipeline(**copy.deepcopy(pipeline.components))
    parts.set_progress_bar_config(disable=True)
    if way == "model":
        parts.enable_model_cpu_offload(device="cpu")
    else:
        skip_without_group_offload()
        parts.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert difference(draw(parts, *PROMPT), expected) < 1e-5
    assert difference(draw(parts, *PROMPT), expected) < 1e-5
