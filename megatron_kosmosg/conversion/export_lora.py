"""`export-lora`: the adapters of a run as a folder that PEFT puts on a stock Kosmos-2."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.exported_folder import new_output_folder
from megatron_kosmosg.conversion.kosmos2 import kosmos2_table
from megatron_kosmosg.conversion.safetensors_files import write_safetensors
from megatron_kosmosg.conversion.tensors import InDtype, InMemory
from megatron_kosmosg.files import write_json
from megatron_kosmosg.progress import ProgressCallback

STEM = "adapter_model"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_TARGETS = r"text_model\.model\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|ffn\.fc[12])"
"""A pattern and no list: the image tower has layers of the same names."""


def export_lora(
    checkpoint: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    progress: ProgressCallback | None = None,
    *,
    ema: bool = False,
) -> list[str]:
    """Writes the decoder's adapters for the `mllm/` that the run started from; returns notes.

    With `ema` the averages of the adapters are written; the other arguments are those of
    `export_hf`. Raises ConversionError for a run without adapters, and for one that also trained
    another part of the language model, which an adapter cannot carry.
    """
    source = CheckpointTensors(checkpoint, ema=ema, with_base=False)
    dtype = dtype or source.export_dtype
    lora = source.config.lora
    if not lora.rank:
        raise ConversionError(
            f"{source.path} was trained without adapters (lora.rank=0); export-hf writes its model"
        )
    whole = [part for part in lora.trains if part != "aligner_m"]
    if whole:
        raise ConversionError(
            f"{source.path} also trained {', '.join(whole)} of the language model "
            "(lora.trains), which adapters do not hold; export-hf writes the merged model"
        )
    tensors = _their_adapters(source)
    with new_output_folder(output, (checkpoint,)) as folder:
        written = write_safetensors(folder, STEM, InDtype(InMemory(tensors), dtype), progress)
        write_json(folder / CONFIG_FILE, _peft_config(source.config), indent=2)
    return [written]


def _their_adapters(source: CheckpointTensors) -> dict[str, torch.Tensor]:
    """The adapters by their names in PEFT's files. A fused projection's adapter becomes one of each
    of its parts: the same A, and the part's rows of B."""
    table = kosmos2_table(source.config.model)
    found = {}
    for module in source.adapted():
        a, b = source.adapter(module)
        for name in table.external_names([f"{module}.weight"]):
            _, rows_of = table.external_recipe(name)
            external = _PREFIX + name.removesuffix(".weight")
            found[f"{external}.lora_A.weight"] = a.clone()  # no two names of a file share memory
            found[f"{external}.lora_B.weight"] = rows_of([b]).contiguous()
    return found


def _peft_config(config: RunConfig) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _TARGETS,
        "inference_mode": True,
    }
