"""Opens the files of a ModelSource as a pipeline, and everything that is added to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ControlNetModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import AlignerConfig
from megatron_kosmosg.config.untrusted_folders import check_pipeline_folder
from megatron_kosmosg.conversion.exported_folder import exported_parts
from megatron_kosmosg.conversion.exported_models import load_aligner, load_mllm
from megatron_kosmosg.conversion.hf_aligner import aligner_sizes
from megatron_kosmosg.conversion.safetensors_files import (
    DIFFUSERS,
    TRANSFORMERS,
    SafetensorsFolder,
)
from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline
from megatron_kosmosg.inference.model_source import ModelSource
from megatron_kosmosg.inference.noise_schedules import noise_scheduler
from megatron_kosmosg.inference.pipeline_generator import PipelineGenerator
from megatron_kosmosg.parallel.devices import has_stream

Opened = TypeVar("Opened")
DRAWING_PARTS = ("vae", "unet", "scheduler")
"""What a pipeline does without where only its conditions are asked for."""


def open_generator(
    source: ModelSource,
    scheduler: str,
    dtype: torch.dtype,
    device: torch.device,
    offload: str | None = None,
) -> PipelineGenerator:
    """The model ready to draw. Raises ConfigError naming the part that cannot be opened.

    Args:
        offload: weights wait in the CPU's memory until `device` needs them. "model": whole parts
            (the U-Net, the VAE, ...) take turns on the device. "sequential": single layers do,
            which is slower and needs the least memory. None: everything stays on the device.
    """
    if offload is not None and not has_stream(device):
        raise ConfigError(f"--offload {offload} needs a GPU; the model is on {device.type} already")
    resting = torch.device("cpu") if offload is not None else device
    for library in (transformers_logging, diffusers_logging):
        library.disable_progress_bar()
    # The oldest diffusers that we support does not know the new name, `dtype`.
    warnings.filterwarnings("ignore", message=".*`torch_dtype` is deprecated")
    pipeline = _opened(f"--model {source.folder}", lambda: open_pipeline(source, dtype, resting))
    pipeline.scheduler = noise_scheduler(scheduler, pipeline.scheduler)
    names = [f"lora_{i}" for i in range(len(source.loras))]
    for name, (file, _) in zip(names, source.loras, strict=True):
        _opened(
            f"--lora {file}",
            lambda f=str(file), n=name: pipeline.load_lora_weights(f, adapter_name=n),
        )
    if names:
        pipeline.set_adapters(names, [strength for _, strength in source.loras])
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    loras = {name: strength for name, (_, strength) in zip(names, source.loras, strict=True)}
    if source.controlnet is None:
        return PipelineGenerator(pipeline, loras=loras)
    folder, strength = source.controlnet
    return PipelineGenerator(pipeline, open_controlnet(folder, dtype), strength, loras)


def open_controlnet(folder: Path, dtype: torch.dtype) -> ControlNetModel:
    """The ControlNet, in the CPU's memory; a PipelineGenerator moves it. Raises ConfigError for
    what cannot be opened."""
    return _opened(
        f"--controlnet {folder}", lambda: ControlNetModel.from_pretrained(folder, torch_dtype=dtype)
    )


def open_pipeline(
    source: ModelSource, dtype: torch.dtype, device: torch.device, draws: bool = True
) -> KosmosGPipeline:
    """The pipeline alone, on `device`. With draws=False it has no U-Net, VAE and scheduler, and is
    asked for conditions alone. Raises ConversionError for a folder that is not whole."""
    # Megatron-Core, which takes seconds to import, is needed for checkpoints only.
    if not source.is_exported:
        from megatron_kosmosg.inference.from_checkpoint import pipeline_from_checkpoint

        stable_diffusion = source.stable_diffusion if draws else None
        return pipeline_from_checkpoint(
            source.folder, stable_diffusion, dtype, device, source.tokenizer_model
        )
    check_pipeline_folder(source.folder)
    mllm, _, _, aligner = exported_parts(source.folder)
    assert aligner is not None, "find_model saw the index that says so"
    # A file that is cut short is told apart from one that holds other weights.
    SafetensorsFolder(mllm, TRANSFORMERS)
    SafetensorsFolder(aligner, DIFFUSERS)
    components: dict[str, Any] = {}
    if not draws:
        components = dict.fromkeys(DRAWING_PARTS)
    elif source.stable_diffusion is not None:
        from megatron_kosmosg.inference.from_checkpoint import diffusion_parts

        sizes = aligner_sizes(aligner)
        read = AlignerConfig(
            hidden_size=sizes["model.aligner.hidden_size"],
            num_queries=sizes["model.aligner.num_queries"],
        )
        components = diffusion_parts(source.stable_diffusion, read, dtype)
    components["mllm"] = load_mllm(mllm, dtype)
    components["aligner"] = load_aligner(aligner, dtype)
    pipeline = KosmosGPipeline.from_pretrained(source.folder, torch_dtype=dtype, **components)
    return pipeline.to(device)


def _opened(what: str, opening: Callable[[], Opened]) -> Opened:
    try:
        return opening()
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(f"{what} cannot be opened: {error}") from error
