"""Tiny models of the real classes with awkward sizes: odd vocabulary, queries and layer counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from megatron_kosmosg.config.schema import (
    AlignerConfig,
    DecoderConfig,
    FrozenFolder,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    ResamplerConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)

VOCAB_SIZE = 101
IMAGE_ID = 97
NUM_LATENT_QUERIES = 5
NUM_QUERIES = 7
CONDITION_WIDTH = 24
TARGET_SIZE = 16
HIDDEN_SIZE = 32


def write_stable_diffusion(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A random Stable Diffusion of the real classes: `unet/ vae/ scheduler/ text_encoder/`."""
    torch.manual_seed(1234)
    UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=CONDITION_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=TARGET_SIZE,
        scaling_factor=0.9,
    ).save_pretrained(folder / "vae")
    DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=53,
            hidden_size=CONDITION_WIDTH,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=NUM_QUERIES,
            projection_dim=16,
        )
    ).save_pretrained(folder / "text_encoder")
    return folder


def model_config(aligner_kind: str = "full") -> ModelConfig:
    """Odd where the real model is even, no dropout, no files."""
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        decoder=DecoderConfig(
            num_layers=3,
            hidden_size=HIDDEN_SIZE,
            ffn_hidden_size=48,
            num_attention_heads=4,
            hidden_dropout=0.0,
        ),
        vision=VisionConfig(
            num_layers=3,
            hidden_size=16,
            ffn_hidden_size=32,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        resampler=ResamplerConfig(
            num_latent_queries=NUM_LATENT_QUERIES, num_attention_heads=4, attention_dropout=0.0
        ),
        aligner=AlignerConfig(
            kind=aligner_kind,
            num_layers=3,
            hidden_size=CONDITION_WIDTH,
            ffn_hidden_size=40,
            num_attention_heads=4,
            num_queries=NUM_QUERIES,
            max_positions=64,
        ),
    )


def tiny_config(stage: str, stable_diffusion: Path, output_dir: Path, **parallel) -> RunConfig:
    """A run of `stage` in float32 without dropout; `parallel` sets fields of ParallelConfig."""
    frozen = FrozenFolder(str(stable_diffusion))
    return RunConfig(
        stage=stage,
        model=dataclasses.replace(model_config(), diffusion=frozen, clip_text=frozen),
        parallel=ParallelConfig(timeout_seconds=60, **parallel),
        training=TrainingConfig(
            train_iters=4, micro_batch_size=2, global_batch_size=4, seed=5, precision="fp32"
        ),
        logging=LoggingConfig(output_dir=str(output_dir)),
    )


def replace_section(config: RunConfig, section: str, **changes) -> RunConfig:
    """The config with fields of one section changed."""
    changed = dataclasses.replace(getattr(config, section), **changes)
    return dataclasses.replace(config, **{section: changed})


def random_batch(stage: str, rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """One micro-batch as the stage's dataset collates it: images in all rows but the last."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, IMAGE_ID, (rows, length), generator=generator)
    tokens[:, 0] = 0
    image_mask = torch.zeros(rows, length, dtype=torch.bool)
    padding_mask = torch.zeros(rows, length, dtype=torch.bool)
    padding_mask[-1, length - 3 :] = stage != "pretrain"
    imaged = [] if stage == "align" else list(range(rows - 1))
    for row in imaged:
        image_mask[row, 3 : 3 + NUM_LATENT_QUERIES] = True
        tokens[row, 2 : 3 + NUM_LATENT_QUERIES] = IMAGE_ID
    tokens[padding_mask] = 1
    pixel_values = torch.randn(len(imaged), 3, 28, 28, generator=generator)
    batch = {
        "tokens": tokens,
        "image_mask": image_mask,
        "padding_mask": padding_mask,
        "pixel_values": pixel_values,
    }
    if stage == "pretrain":
        batch["labels"] = torch.roll(tokens, -1, dims=1)
        batch["loss_mask"] = (~torch.roll(image_mask, -1, dims=1)).float()
    elif stage == "align":
        batch["clip_tokens"] = torch.randint(0, 53, (rows, NUM_QUERIES), generator=generator)
    else:
        targets = torch.randn(rows, 3, TARGET_SIZE, TARGET_SIZE, generator=generator)
        batch["target_pixel_values"] = targets.clamp(-1, 1)
        batch["target_weights"] = torch.ones(rows)
        batch["stream_positions"] = torch.arange(rows) + 100 * seed
    return batch
