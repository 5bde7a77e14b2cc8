"""`verify`: two models of any format on the same random prompts, largest differences of outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import Kosmos2Config

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.exported_folder import exported_parts
from megatron_kosmosg.conversion.import_fairseq import FairseqImport, open_fairseq
from megatron_kosmosg.conversion.kosmos2 import text_and_vision
from megatron_kosmosg.conversion.model_outputs import (
    PromptShape,
    outputs_of_folder,
    outputs_of_native,
    prompt_shape,
    random_prompts,
)

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Side:
    """One of the two models that are compared."""

    description: str
    shape: PromptShape
    run: Callable[[Outputs], Outputs]


@dataclass(frozen=True)
class Difference:
    """How far two outputs are apart; padding is not looked at."""

    name: str
    largest_value: float
    largest_difference: float

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest value."""
        return self.largest_difference / self.largest_value if self.largest_value else 0.0


def verify(
    a: Path,
    b: Path,
    seed: int = 0,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    trust: bool = False,
) -> list[Difference]:
    """The differences between the outputs of two models for the same random prompts: hidden states,
    logits and, where both have M, conditions.

    Args:
        a: a run or checkpoint of ours, an authors' file, or a folder of export-hf or export-mllm.
        b: another one.
        seed: of the prompts.
        config_file: for an authors' file, as in `import_fairseq`; so are overrides and trust.

    Raises:
        ConversionError: the two cannot be compared.
    """
    if (config_file is not None or overrides) and not (a.is_file() or b.is_file()):
        raise ConversionError(
            "--config and settings say what the numbers of an authors' file mean, and neither --a "
            "nor --b is one; leave them out"
        )
    sides = [open_side(path, config_file, overrides, trust) for path in (a, b)]
    if sides[0].shape != sides[1].shape:
        raise ConversionError(
            f"these are models of other sizes: {a} has {sides[0].shape}, {b} has {sides[1].shape}"
        )
    prompts = random_prompts(sides[0].shape, seed)
    found = []
    for side in sides:
        print(f"running {side.description}")
        found.append(side.run(prompts))
    return differences(found[0], found[1], prompts["padding_mask"])


def differences(a: Outputs, b: Outputs, padding_mask: torch.Tensor) -> list[Difference]:
    """The differences of the outputs that both models have. Raises ConversionError where their
    shapes differ."""
    result = []
    for name in ("hidden", "logits", "condition"):
        if name not in a or name not in b:
            continue
        first, second = a[name].double(), b[name].double()
        if first.shape != second.shape:
            raise ConversionError(
                f"{name} has shape {list(first.shape)} in one model, {list(second.shape)} in the "
                "other"
            )
        if name != "condition":
            first, second = first[~padding_mask], second[~padding_mask]
        largest = first.abs().max().item()
        result.append(Difference(name, largest, (first - second).abs().max().item()))
    return result


def open_side(path: Path, config_file: Path | None, overrides: Sequence[str], trust: bool) -> Side:
    """The model at `path`, whatever its format; nothing large is read yet."""
    if path.is_file():
        job = FairseqImport(
            input=path,
            output=path,  # not written: it only becomes a setting
            config_file=config_file,
            overrides=overrides,
            trust=trust,
        )
        config, source, _ = open_fairseq(job)
        return Side(
            f"{path}: authors' file, stage {config.stage}, with Megatron-Core",
            prompt_shape(config),
            lambda prompts: outputs_of_native(config, source, prompts),
        )
    parts = exported_parts(path)
    if parts.aligner is None and not (path / "config.json").is_file():
        checkpoint = CheckpointTensors(path)
        return Side(
            f"{checkpoint.path}: checkpoint, stage {checkpoint.stage}, with Megatron-Core",
            prompt_shape(checkpoint.config),
            lambda prompts: outputs_of_native(checkpoint.config, checkpoint.apart(), prompts),
        )
    stock = Kosmos2Config.from_pretrained(parts.mllm, local_files_only=True)
    text, vision = text_and_vision(stock)
    # Square: the annotation has other vision towers' pairs, too.
    shape = PromptShape(text.vocab_size, stock.latent_query_num, cast(int, vision.image_size))
    return Side(
        f"{path}: Hugging Face folder, with transformers"
        + ("" if parts.aligner is None else " and the aligner component"),
        shape,
        lambda prompts: outputs_of_folder(parts.mllm, parts.aligner, prompts),
    )
