"""The files of an exported model: stock Kosmos-2, tokenizer, image processor, aligner, index.

One diffusers folder of stock classes and one small component that brings its own .py file.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.exported_folder import (
    ALIGNER,
    IMAGE_PROCESSOR,
    INDEX_FILE,
    MLLM,
    TOKENIZER,
    read_model_json,
)
from megatron_kosmosg.conversion.hf_aligner import aligner_arguments, aligner_weights
from megatron_kosmosg.conversion.hf_tokenizer import checked_vocabulary, write_tokenizer
from megatron_kosmosg.conversion.kosmos2 import kosmos2_config, kosmos2_weights
from megatron_kosmosg.conversion.safetensors_files import (
    DIFFUSERS,
    TRANSFORMERS,
    write_safetensors,
)
from megatron_kosmosg.conversion.tensors import InDtype
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.files import write_json
from megatron_kosmosg.hf import modeling_kosmosg_aligner, pipeline_kosmosg
from megatron_kosmosg.progress import ProgressCallback

KOSMOS2_SLOTS = 64
"""Of an image, in stock Kosmos-2."""


def write_mllm(
    folder: Path,
    source: CheckpointTensors,
    dtype: torch.dtype | None,
    progress: ProgressCallback | None,
) -> str:
    """Writes a stock Kosmos2ForConditionalGeneration, and says how much; dtype None keeps ours."""
    weights = InDtype(kosmos2_weights(source, source.config), dtype)
    stock = kosmos2_config(source.config)
    stock.dtype = next(iter(weights.names().values())).dtype
    written = write_safetensors(folder, TRANSFORMERS, weights, progress)
    stock.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=Tokenizer.bos_id,
        eos_token_id=Tokenizer.eos_id,
        pad_token_id=Tokenizer.pad_id,
    ).save_pretrained(folder)
    return written


def write_aligner(
    folder: Path,
    source: CheckpointTensors,
    dtype: torch.dtype | None,
    progress: ProgressCallback | None,
) -> str:
    """Writes AlignerNet M as a component with its own .py file, and says how much."""
    weights = InDtype(aligner_weights(source, source.config), dtype)
    written = write_safetensors(folder, DIFFUSERS, weights, progress)
    settings = {
        "_class_name": modeling_kosmosg_aligner.KosmosGAligner.__name__,
        "_diffusers_version": version("diffusers"),
        **aligner_arguments(source.config),
    }
    write_json(folder / "config.json", settings, indent=2)
    _copy_module(modeling_kosmosg_aligner, folder, pipeline_kosmosg.ALIGNER_MODULE)
    return written


def write_image_processor(folder: Path, config: RunConfig) -> None:
    """CLIP's image processor with the run's size, mean and deviation.

    Written by hand: transformers would record the name of the backend that is installed here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = config.model.vision.image_size
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.data.image_mean),
        "image_std": list(config.data.image_std),
    }
    write_json(folder / "preprocessor_config.json", settings, indent=2)


def write_processor(folder: Path, config: RunConfig) -> None:
    """Makes tokenizer and image processor, which lie in `folder`, the parts of a stock processor.

    Kosmos2Processor writes an image's place in special tokens and reads them as such, so that this
    folder's tokenizer has to. Of its own tokens the model has no rows: it gets none for places.
    """
    processor = {"processor_class": "Kosmos2Processor"}
    write_json(
        folder / "processor_config.json", {**processor, "num_patch_index_tokens": 0}, indent=2
    )
    tokenizer: dict[str, bool | int] = {"split_special_tokens": False}
    slots = config.model.resampler.num_latent_queries
    if slots != KOSMOS2_SLOTS:  # taken for the processor's default
        tokenizer["num_image_tokens"] = slots
    for name, more in (("tokenizer_config.json", tokenizer), ("preprocessor_config.json", {})):
        write_json(folder / name, {**read_model_json(folder / name), **processor, **more}, indent=2)


def write_index(folder: Path, stable_diffusion: dict[str, list[str]]) -> None:
    """Writes model_index.json and the pipeline's .py file.

    Args:
        stable_diffusion: the entries of unet, vae and scheduler.
    """
    absent = ("text_encoder", "safety_checker", "feature_extractor", "image_encoder")
    parts = {
        **{name: [None, None] for name in absent},
        **stable_diffusion,
        MLLM: ["transformers", "Kosmos2ForConditionalGeneration"],
        IMAGE_PROCESSOR: ["transformers", "CLIPImageProcessor"],
        TOKENIZER: ["transformers", "PreTrainedTokenizerFast"],
        ALIGNER: [
            pipeline_kosmosg.ALIGNER_MODULE,
            modeling_kosmosg_aligner.KosmosGAligner.__name__,
        ],
    }
    index = {
        "_class_name": [
            pipeline_kosmosg.PIPELINE_MODULE,
            pipeline_kosmosg.KosmosGPipeline.__name__,
        ],
        "_diffusers_version": version("diffusers"),
        "requires_safety_checker": False,
        **dict(sorted(parts.items())),
    }
    write_json(folder / INDEX_FILE, index, indent=2)
    _copy_module(pipeline_kosmosg, folder, pipeline_kosmosg.PIPELINE_MODULE)


def tokenizer_model(config: RunConfig, requested: Path | None) -> Path:
    """The SentencePiece model to export: the requested one, else the run's.

    Raises ConversionError when there is none or its vocabulary is not the model's.
    """
    path, named = requested, config.data.tokenizer_model
    if path is None and named is not None:
        path = Path(named)
    if path is None:
        raise ConversionError("the checkpoint names no tokenizer; give --tokenizer-model")
    checked_vocabulary(path, config.model.vocab_size)
    return path


def write_tokenizer_files(folder: Path, model_path: Path, config: RunConfig) -> None:
    """The tokenizer with the run's longest sequence as its limit."""
    write_tokenizer(model_path, folder, config.data.seq_length)


def _copy_module(module: Any, folder: Path, name: str) -> None:
    shutil.copyfile(module.__file__, folder / f"{name}.py")
