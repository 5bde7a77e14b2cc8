"""Checkpoints of tiny random models with the toy tokenizer, written without any training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.checkpoint_writer import model_tensors, write_checkpoint
from megatron_kosmosg.conversion.export_hf import export_hf, export_mllm
from megatron_kosmosg.conversion.tensors import InMemory
from megatron_kosmosg.toy import assets
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion

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


class ConversionWorld:
    """A tiny trained-looking world: checkpoints, Stable Diffusion, one export."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.sd = write_stable_diffusion(folder / "sd")
        self.run, self.exported = folder / "instruct", folder / "exported"
        self.config = conversion_config("instruct", folder)
        self.weights = write_random(self.run, self.config)
        self.notes = export_hf(self.run, self.sd, self.exported)
        self.pretrain, self.mllm = folder / "pretrain", folder / "mllm"
        self.language = write_random(self.pretrain, conversion_config("pretrain", folder))
        export_mllm(self.pretrain, self.mllm)


def same_weights(folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Asserts that the checkpoint holds exactly `weights`, cast to `dtype`."""
    found = CheckpointTensors(folder)
    assert found.names().keys() == weights.keys()
    for name, expected in weights.items():
        got = found.read(name)
        assert got.dtype == dtype and torch.equal(got, expected.to(dtype)), name


def edit_weights(folder: Path, edit: Callable[[dict], object]) -> None:
    """Applies `edit` to the language model's weights in an exported folder."""
    path = folder / "mllm" / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def nothing_written(output: Path) -> bool:
    """Whether neither the output nor anything beside it that starts with its name is there."""
    return not output.exists() and not list(output.parent.glob(f"{output.name}*"))
