"""A KosmosGPipeline straight from a training checkpoint: what an export would hold, in memory.

The weights go through the export's own rule tables into the same classes, so that there is one
forward path. A checkpoint of any layout is read in one process, without process groups.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin
from transformers import AutoTokenizer, CLIPImageProcessor, Kosmos2ForConditionalGeneration

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.schema import AlignerConfig
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.exported_models import load_with_report
from megatron_kosmosg.conversion.hf_aligner import (
    NATIVE_PREFIXES,
    aligner_arguments,
    aligner_weights,
)
from megatron_kosmosg.conversion.hf_folder import (
    tokenizer_model,
    write_image_processor,
    write_tokenizer_files,
)
from megatron_kosmosg.conversion.kosmos2 import kosmos2_config, kosmos2_weights
from megatron_kosmosg.conversion.safetensors_files import DIFFUSERS
from megatron_kosmosg.conversion.stable_diffusion import StableDiffusion
from megatron_kosmosg.conversion.tensors import InDtype, TensorSource
from megatron_kosmosg.hf.modeling_kosmosg_aligner import KosmosGAligner
from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline


def pipeline_from_checkpoint(
    run: Path,
    stable_diffusion: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    spm_model: Path | None = None,
) -> KosmosGPipeline:
    """The pipeline of a run's newest checkpoint (or of an `iter_` folder), in eval mode.

    stable_diffusion: folder with the `unet/ vae/ scheduler/` that draw; None: it has none of them,
    and gives conditions alone.
    spm_model: SentencePiece model, where the checkpoint's `data.tokenizer_model` is not there.
    To keep it as a folder, use export-hf. Raises ConversionError for what that refuses.
    """
    checkpoint = CheckpointTensors(run)
    if not any(name.startswith(NATIVE_PREFIXES) for name in checkpoint.names()):
        raise ConversionError(
            f"{checkpoint.path} is of stage {checkpoint.stage} and has no AlignerNet; images "
            "need a checkpoint of align or instruct"
        )
    diffusion: dict[str, Any] = {"vae": None, "unet": None, "scheduler": None}
    if stable_diffusion is not None:
        diffusion = diffusion_parts(stable_diffusion, checkpoint.config.model.aligner, dtype)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer, images = Path(temporary, "tokenizer"), Path(temporary, "images")
        spm = tokenizer_model(checkpoint.config, spm_model)
        write_tokenizer_files(tokenizer, spm, checkpoint.config)
        write_image_processor(images, checkpoint.config)
        texts = {
            "tokenizer": AutoTokenizer.from_pretrained(tokenizer),
            "mllm_image_processor": CLIPImageProcessor.from_pretrained(images),
        }
    return KosmosGPipeline(
        **texts,
        mllm=_language_model(checkpoint, dtype),
        aligner=_aligner(checkpoint, dtype),
        **diffusion,
    ).to(device)


def diffusion_parts(
    folder: Path, aligner: AlignerConfig, dtype: torch.dtype
) -> dict[str, ModelMixin | SchedulerMixin]:
    """U-Net, VAE and scheduler of a Stable Diffusion folder, as arguments of the pipeline.

    Raises ConversionError for a folder that is incomplete or does not fit the aligner.
    """
    index = StableDiffusion(folder, aligner).index
    parts = {}
    for name in ("unet", "vae"):
        # A folder may hold the half-precision variant only.
        has_full = any((folder / name).glob(f"{DIFFUSERS}.safetensors*"))
        parts[name] = getattr(diffusers, index[name][1]).from_pretrained(
            folder,
            subfolder=name,
            torch_dtype=dtype,
            variant=None if has_full else "fp16",
            use_safetensors=True,
        )
    scheduler = getattr(diffusers, index["scheduler"][1])
    return parts | {"scheduler": scheduler.from_pretrained(folder, subfolder="scheduler")}


def _language_model(
    checkpoint: CheckpointTensors, dtype: torch.dtype
) -> Kosmos2ForConditionalGeneration:
    weights = InDtype(kosmos2_weights(checkpoint, checkpoint.config), dtype)
    model, report = load_with_report(
        Kosmos2ForConditionalGeneration.from_pretrained,
        None,
        config=kosmos2_config(checkpoint.config),
        state_dict=_tensors(weights),
        dtype=dtype,
    )
    wrong = {what: names for what, names in report.items() if names}
    assert not wrong, f"the rule table does not give stock Kosmos-2's weights: {wrong}"
    return model


def _aligner(checkpoint: CheckpointTensors, dtype: torch.dtype) -> KosmosGAligner:
    weights = InDtype(aligner_weights(checkpoint, checkpoint.config), dtype)
    with torch.device("meta"):
        aligner = KosmosGAligner(**aligner_arguments(checkpoint.config))
    aligner.load_state_dict(_tensors(weights), assign=True)
    return aligner


def _tensors(source: TensorSource) -> dict[str, torch.Tensor]:
    return {name: source.read(name) for name in source.names()}
