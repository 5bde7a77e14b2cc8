"""Loads an exported folder in one of several ways, each in a process of its own.

usage: python fresh_loads.py WAY FOLDER OUT
Reads OUT/inputs.safetensors, writes OUT/WAY.safetensors. Imports nothing of this repository except
where the way is `with_package`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROMPT = "A <image> in the snow"


def with_remote_code(folder: Path, out: Path, inputs: dict) -> dict[str, torch.Tensor]:
    """Without the package; saved again and loaded once more."""
    without_package()
    from diffusers import DiffusionPipeline

    try:
        DiffusionPipeline.from_pretrained(folder)
    except ValueError as error:
        (out / "refusal.txt").write_text(str(error))
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    first = draw(pipeline, inputs)
    pipeline.save_pretrained(out / "saved-again")
    again = DiffusionPipeline.from_pretrained(out / "saved-again", trust_remote_code=True)
    return {"images": first, "images_saved_again": draw(again, inputs)}


def with_package(folder: Path, out: Path, inputs: dict) -> dict[str, torch.Tensor]:
    """No trust flag: the classes are those of the package."""
    from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline

    pipeline = KosmosGPipeline.from_pretrained(folder)
    assert not any(name.startswith("diffusers_modules") for name in sys.modules)
    pipeline.save_pretrained(out / "saved-by-package")
    return {"images": draw(pipeline, inputs)}


def stock_classes(folder: Path, out: Path, inputs: dict) -> dict[str, torch.Tensor]:
    """The language model with transformers alone, then the drawing parts with diffusers."""
    without_package()
    return {**language_model(folder, inputs), **stable_diffusion(folder, inputs)}


def language_model(folder: Path, inputs: dict) -> dict[str, torch.Tensor]:
    """Stock transformers alone."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, subfolder="mllm", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")) == 327
    with torch.no_grad():
        output = model(
            pixel_values=inputs["pixel_values"],
            input_ids=inputs["tokens"],
            image_embeds_position_mask=inputs["slots"],
            output_hidden_states=True,
        )
    assert "diffusers" not in sys.modules
    return {"logits": output.logits, "hidden": output.hidden_states[-1]}


def stable_diffusion(folder: Path, inputs: dict) -> dict[str, torch.Tensor]:
    """The stock pipeline of the folder's U-Net, VAE and scheduler, fed with embeddings.

    `StableDiffusionPipeline.from_pretrained` itself follows model_index.json to KosmosGPipeline.
    """
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        unet=UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        scheduler=DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {"images": sample(pipeline, **{name: inputs[name] for name in names})}


def without_package() -> None:
    """Makes importing this repository's package an error."""
    sys.modules["megatron_kosmosg"] = None


def draw(pipeline, inputs: dict) -> torch.Tensor:
    """The image of PROMPT with the image of the inputs."""
    from PIL import Image

    image = Image.fromarray(inputs["picture"].numpy())
    return sample(pipeline, prompt=PROMPT, images=[image], negative_prompt="blue")


def sample(pipeline, **arguments) -> torch.Tensor:
    """[1, 3, h, w] after two steps from the noise of seed 0."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        **arguments,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


WAYS = {way.__name__: way for way in (with_remote_code, with_package, stock_classes)}


def main() -> None:
    way, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    results = WAYS[way](folder, out, load_file(out / "inputs.safetensors"))
    save_file({k: v.contiguous() for k, v in results.items()}, out / f"{way}.safetensors")


if __name__ == "__main__":
    main()
