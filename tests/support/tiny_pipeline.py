"""A KosmosGPipeline of the real classes with random weights, and what tests draw with it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from megatron_kosmosg.conversion.hf_tokenizer import write_tokenizer
from megatron_kosmosg.hf.modeling_kosmosg_aligner import KosmosGAligner
from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline
from megatron_kosmosg.toy import assets
from tests.support.tiny_models import (
    CONDITION_WIDTH,
    NUM_LATENT_QUERIES,
    NUM_QUERIES,
    write_stable_diffusion,
)

HIDDEN = 32
IMAGE_SIZE = 28
LONGEST_PROMPT = 40


def tiny_pipeline(folder: Path) -> KosmosGPipeline:
    """The pipeline from live modules; `folder` takes the files that some of them come from."""
    stable_diffusion = write_stable_diffusion(folder / "stable-diffusion")
    model = assets.path() / "sentencepiece.model"
    write_tokenizer(model, folder / "tokenizer", model_max_length=LONGEST_PROMPT)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    torch.manual_seed(7)
    mllm = Kosmos2ForConditionalGeneration(mllm_config(len(tokenizer)))
    with torch.no_grad():  # as it is initialised, images hardly change what it says
        for parameter in mllm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    pipeline = KosmosGPipeline(
        vae=AutoencoderKL.from_pretrained(stable_diffusion / "vae"),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(stable_diffusion / "unet"),
        scheduler=DDPMScheduler.from_pretrained(stable_diffusion / "scheduler"),
        mllm=mllm,
        aligner=KosmosGAligner(
            input_size=HIDDEN,
            hidden_size=CONDITION_WIDTH,
            ffn_hidden_size=40,
            num_layers=2,
            num_attention_heads=4,
            num_queries=NUM_QUERIES,
            max_positions=64,
        ),
        mllm_image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def mllm_config(vocab_size: int) -> Kosmos2Config:
    """A small Kosmos-2; dropout as in the real one."""
    return Kosmos2Config(
        text_config={
            "vocab_size": vocab_size,
            "embed_dim": HIDDEN,
            "layers": 2,
            "ffn_dim": 48,
            "attention_heads": 4,
            "max_position_embeddings": LONGEST_PROMPT,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
        },
        latent_query_num=NUM_LATENT_QUERIES,
    )


def prompt_image(seed: int, width: int = 40, height: int = 33) -> Image.Image:
    """An image of random blocks; another for every seed."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(blocks.numpy()).resize((width, height), Image.Resampling.NEAREST)


def draw(pipeline, *prompt, **settings) -> torch.Tensor:
    """[n, 3, h, w] in 0 to 1: two steps from the noise of seed 0, unless settings say otherwise."""
    settings = {
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
        **settings,
    }
    return pipeline(*prompt, **settings).images
