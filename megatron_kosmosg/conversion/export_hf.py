"""`export-hf` and `export-mllm`: a training checkpoint as the folders that stock libraries open."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion import hf_folder
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.exported_folder import (
    ALIGNER,
    IMAGE_PROCESSOR,
    MLLM,
    TOKENIZER,
    new_output_folder,
)
from megatron_kosmosg.conversion.hf_aligner import NATIVE_PREFIXES, NOT_EXPORTED
from megatron_kosmosg.conversion.model_card import write_model_card
from megatron_kosmosg.conversion.rules import summary
from megatron_kosmosg.conversion.stable_diffusion import StableDiffusion
from megatron_kosmosg.progress import ProgressCallback
from megatron_kosmosg.stages import stage_facts


def export_hf(
    checkpoint: Path,
    sd: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    progress: ProgressCallback | None = None,
    *,
    ema: bool = False,
) -> list[str]:
    """Writes an `align` or `instruct` checkpoint as a folder for diffusers.

    Args:
        checkpoint: a run's folder, its checkpoints, or one of them.
        sd: a folder of Stable Diffusion in diffusers' form, whose U-Net, VAE and scheduler are
            taken.
        output: the folder to write; it appears whole or not at all.
        dtype: of the weights; None keeps the checkpoint's for the language side and the folder's
            for Stable Diffusion.
        tokenizer: SentencePiece model, where the one that the checkpoint names is not to be used.
        progress: is told how far the writing is.
        ema: take the averages of the weights instead of the weights.

    Returns:
        Notes for the user, such as what the folder does not hold.

    Raises:
        ConversionError: the checkpoint has no AlignerNet, or no averages where `ema` asks for them.
    """
    source = CheckpointTensors(checkpoint, ema=ema)
    config, dtype = source.config, dtype or source.export_dtype
    if not stage_facts(config.stage).aligner_parts:
        raise ConversionError(
            f"{source.path} is a {config.stage} checkpoint and has no AlignerNet; export-mllm "
            "writes its language model, export-hf takes an align or instruct checkpoint"
        )
    stable_diffusion = StableDiffusion(sd, config.model.aligner)
    model_file = hf_folder.tokenizer_model(config, tokenizer)
    dropped = [name for name in source.names() if name.startswith(NOT_EXPORTED)]
    with new_output_folder(output, (checkpoint, sd, model_file)) as folder:
        hf_folder.write_tokenizer_files(folder / TOKENIZER, model_file, config)
        hf_folder.write_image_processor(folder / IMAGE_PROCESSOR, config)
        written = {
            MLLM: hf_folder.write_mllm(folder / MLLM, source, dtype, progress),
            ALIGNER: hf_folder.write_aligner(folder / ALIGNER, source, dtype, progress),
            **stable_diffusion.write(folder, dtype, progress),
        }
        hf_folder.write_index(folder, stable_diffusion.index)
        write_model_card(folder, is_pipeline=True)
    return [
        *(f"{part + ':':8} {amount}" for part, amount in written.items()),
        *_dropped_notes(dropped, "AlignerNet N, which only `align` trains with"),
    ]


def export_mllm(
    checkpoint: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    progress: ProgressCallback | None = None,
    *,
    ema: bool = False,
) -> list[str]:
    """Writes the language model of any checkpoint with its tokenizer and image processor: one
    folder for `AutoModelForImageTextToText`, `AutoProcessor` and the pipeline of that task.

    Returns notes for the user; the arguments are those of `export_hf`.
    """
    source = CheckpointTensors(checkpoint, ema=ema)
    config, dtype = source.config, dtype or source.export_dtype
    model_file = hf_folder.tokenizer_model(config, tokenizer)
    dropped = [
        name for name in source.names() if name.startswith((*NATIVE_PREFIXES, *NOT_EXPORTED))
    ]
    with new_output_folder(output, (checkpoint, model_file)) as folder:
        written = hf_folder.write_mllm(folder, source, dtype, progress)
        hf_folder.write_tokenizer_files(folder, model_file, config)
        hf_folder.write_image_processor(folder, config)
        hf_folder.write_processor(folder, config)
        write_model_card(folder, is_pipeline=False)
    return [
        written,
        *_dropped_notes(dropped, "AlignerNet, which is no part of the language model"),
    ]


def _dropped_notes(names: list[str], what: str) -> list[str]:
    if not names:
        return []
    listed = summary(names, limit=len(names))
    return [f"not exported: {len(names)} tensors of {what}", *(f"  {name}" for name in listed)]
