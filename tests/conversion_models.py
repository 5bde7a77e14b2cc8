"""Checkpoints of tiny random models with the toy tokenizer, written without any training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.conversion.checkpoint_writer import model_tensors, write_checkpoint
from megatron_kosmosg.conversion.tensors import InMemory
from megatron_kosmosg.toy import assets
from tests.tiny_models import replace_section, tiny_config

TOKENIZER = assets.path() / "sentencepiece.model"
VOCAB_SIZE = 327


def conversion_config(stage: str, folder: Path, kind: str = "full") -> RunConfig:
    """The tiny model with the toy tokenizer's vocabulary; nothing of `folder` is written."""
    config = tiny_config(stage, folder / "stable-diffusion", folder / "run")
    aligner = dataclasses.replace(config.model.aligner, kind=kind)
    config = replace_section(config, "model", vocab_size=VOCAB_SIZE, aligner=aligner)
    return replace_section(config, "data", tokenizer_model=str(TOKENIZER), seq_length=80)


def random_weights(
    config: RunConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Weights of size one over the square root of their inputs, LayerNorms around one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in model_tensors(config).items():
        value = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.2 * value
        elif len(shape) > 1:
            value = value / shape[-1] ** 0.5
        weights[name] = value.to(dtype)
    return weights


def write_random(
    folder: Path, config: RunConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Writes a checkpoint of random weights, which are returned."""
    weights = random_weights(config, dtype, seed)
    write_checkpoint(folder, config, InMemory(weights))
    return weights
