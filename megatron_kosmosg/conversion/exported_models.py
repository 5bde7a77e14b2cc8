"""The models of an exported folder, loaded only if every weight is there.

The libraries' own loading draws missing weights at random and says so in a log at most.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from transformers import Kosmos2ForConditionalGeneration

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.untrusted_folders import check_model_config
from megatron_kosmosg.hf.modeling_kosmosg_aligner import KosmosGAligner


def load_mllm(folder: Path, dtype: torch.dtype) -> Kosmos2ForConditionalGeneration:
    """The stock model in eval mode. Raises ConversionError unless every weight was there, and
    for a config that asks for code from elsewhere."""
    check_model_config(folder / "config.json")
    model, report = Kosmos2ForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    _check(folder, "stock Kosmos-2", report)
    return model.eval()


def load_aligner(folder: Path, dtype: torch.dtype) -> KosmosGAligner:
    """The component in eval mode. Raises ConversionError unless every weight was there."""
    model, report = KosmosGAligner.from_pretrained(
        folder, torch_dtype=dtype, output_loading_info=True, local_files_only=True
    )
    _check(folder, "aligner component", report)
    return model.eval()


def _check(folder: Path, what: str, report: Mapping[str, Collection]) -> None:
    problems = {kind: list(names) for kind, names in report.items() if names}
    if problems:
        raise ConversionError(f"{folder} is no whole {what}: {problems}")
