"""The models of an exported folder, loaded only if every weight is there.

The libraries' own loading draws missing weights at random and says so in a log at most.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Kosmos2ForConditionalGeneration

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.untrusted_folders import check_model_config
from megatron_kosmosg.hf.modeling_kosmosg_aligner import KosmosGAligner

Model = TypeVar("Model", bound=torch.nn.Module)
Report = Mapping[str, Collection]
"""Names of weights by what is wrong with them."""


def load_mllm(folder: Path, dtype: torch.dtype) -> Kosmos2ForConditionalGeneration:
    """The stock model in eval mode. Raises ConversionError unless every weight was there, and
    for a config that asks for code from elsewhere."""
    check_model_config(folder / "config.json")
    model, report = load_with_report(
        Kosmos2ForConditionalGeneration.from_pretrained, folder, dtype=dtype, local_files_only=True
    )
    _check(folder, "stock Kosmos-2", report)
    return model.eval()


def load_aligner(folder: Path, dtype: torch.dtype) -> KosmosGAligner:
    """The component in eval mode. Raises ConversionError unless every weight was there."""
    model, report = load_with_report(
        KosmosGAligner.from_pretrained, folder, torch_dtype=dtype, local_files_only=True
    )
    _check(folder, "aligner component", report)
    return model.eval()


def load_with_report(
    from_pretrained: Callable[..., Model], *args: Any, **settings: Any
) -> tuple[Model, Report]:
    """What a library's `from_pretrained` loads, and what it says of the weights."""
    # Any: the libraries annotate the model alone.
    found: Any = from_pretrained(*args, output_loading_info=True, **settings)
    return found


def _check(folder: Path, what: str, report: Report) -> None:
    problems = {kind: list(names) for kind, names in report.items() if names}
    if problems:
        raise ConversionError(f"{folder} is no whole {what}: {problems}")
