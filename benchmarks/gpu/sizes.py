"""The models that are measured: the paper's sizes, or tiny ones of the same classes, with random
weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import RunConfig

_TINY_MODEL = (
    "model.vocab_size=101",
    "model.decoder.num_layers=2",
    "model.decoder.hidden_size=32",
    "model.decoder.ffn_hidden_size=48",
    "model.decoder.num_attention_heads=4",
    "model.vision.num_layers=2",
    "model.vision.hidden_size=16",
    "model.vision.ffn_hidden_size=32",
    "model.vision.num_attention_heads=2",
    "model.vision.image_size=28",
    "model.resampler.num_latent_queries=5",
    "model.resampler.num_attention_heads=4",
    "model.aligner.num_layers=1",
    "model.aligner.hidden_size=32",
    "model.aligner.ffn_hidden_size=40",
    "model.aligner.num_attention_heads=4",
    "model.aligner.num_queries=7",
    "model.aligner.max_positions=128",
    "data.target_image_size=16",
)


@dataclass(frozen=True)
class Sizes:
    """What is measured, at which batches, for how long."""

    model: tuple[str, ...]
    """Overrides of the shipped configs."""
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    latent_side: int
    rows: dict[str, tuple[int, float]]
    """{"pretrain", "align", "instruct", "packed": (positions a row, images a row)}."""
    batches: dict[str, tuple[int, ...]]
    """{what: batches to try, ascending}."""
    seconds: float
    """Of every timing."""
    images: tuple[int, int, int]
    """How many encoded images, their width and their height."""
    compiler: str
    """torch.compile's backend."""
    readers: int
    """Threads that hand over the random batches; 0: the one that trains."""


FULL = Sizes(
    model=(),
    unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    vae={
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    },
    text={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
    },
    latent_side=64,
    # instruct: the mean of the paper's mixture; align: of its captions.
    rows={
        "pretrain": (2048, 20),
        "align": (40, 0),
        "instruct": (215, 1.5),
        "packed": (4096, 0),
    },
    batches={
        "pretrain": (1, 2, 4, 8),
        "align": (14, 56, 224),
        "instruct": (4, 8, 16, 32, 64),
        "packed": (1, 2, 4),
        "unet": (8, 16, 32, 64),
        "vae": (8, 16, 32),
    },
    seconds=3,
    images=(512, 640, 512),
    compiler="inductor",
    readers=1,
)
SMOKE = Sizes(
    model=_TINY_MODEL,
    unet={
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    vae={
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
    },
    text={
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 7,
        "projection_dim": 16,
        "bos_token_id": 51,
        "eos_token_id": 52,
    },
    latent_side=8,
    rows={"pretrain": (24, 2), "align": (9, 0), "instruct": (20, 1.5), "packed": (32, 0)},
    batches=dict.fromkeys(("pretrain", "align", "packed", "unet", "vae"), (2,))
    | {"instruct": (2, 4)},
    seconds=0,
    images=(8, 48, 40),
    compiler="eager",
    readers=0,
)
SIZES = {"full": FULL, "smoke": SMOKE}
_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}


def write_frozen_models(sizes: Sizes, folder: Path, device: torch.device) -> None:
    """A Stable Diffusion folder of these sizes in bf16, its random weights drawn on `device`."""
    if (folder / "scheduler").is_dir():
        return
    torch.manual_seed(0)
    with torch.device(device):
        made = {
            "unet": UNet2DConditionModel(**sizes.unet),
            "vae": AutoencoderKL(**sizes.vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**sizes.text)),
        }
    for name, model in made.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(_SCHEDULER))


def run_config(
    sizes: Sizes, stage: str, folder: Path, *overrides: str, positions: int | None = None
) -> RunConfig:
    """The stage's shipped config on one device in bf16; `folder` has the frozen models."""
    length = positions or sizes.rows[stage][0]
    return load_config(
        f"{stage}_256gpu",
        [
            *sizes.model,
            f"data.seq_length={length}",
            f"model.diffusion.path={folder / 'models'}",
            f"model.clip_text.path={folder / 'models'}",
            "model.vision.path=null",
            *(f"parallel.{name}_model_parallel_size=1" for name in ("tensor", "pipeline")),
            "parallel.sequence_parallel=false",
            "parallel.world_size=1",
            "parallel.overlap_grad_reduce=false",
            "parallel.overlap_param_gather=false",
            "score.placement=colocated",
            "training.precision=bf16",
            "training.micro_batch_size=1",
            "training.global_batch_size=1",
            f"data.num_workers={sizes.readers}",
            "logging.tensorboard=false",
            f"logging.output_dir={folder / 'run'}",
            *overrides,
        ],
    )
