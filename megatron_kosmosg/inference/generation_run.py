"""One run of `kosmosg generate` on one rank: settings, the model when it is needed, progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.files import fingerprint
from megatron_kosmosg.inference.generate import ImageGenerator, Job, generate, write_sheet
from megatron_kosmosg.inference.image_plan import ImagePlan, RunSettings
from megatron_kosmosg.inference.model_source import ModelSource
from megatron_kosmosg.inference.prompt_records import GenerationOptions, PromptRecord
from megatron_kosmosg.launcher import RankInfo
from megatron_kosmosg.progress import Progress


@dataclass(frozen=True)
class RunRequest:
    """What a run is to draw, with what and where to."""

    records: Sequence[PromptRecord]
    is_list: bool
    """Whether they come from a file."""
    source: ModelSource
    defaults: GenerationOptions
    scheduler: str
    dtype: str
    device: torch.device
    output: Path
    batch_size: int = 1
    """Prompts drawn together."""
    sheet_rows: int = 0
    """Prompts on the contact sheet."""
    rounds_down: bool = False
    """See RunSettings."""


@dataclass(frozen=True)
class Finished:
    """What a rank has drawn in its run."""

    num_drawn: int
    num_kept: int
    """Images that were finished before."""
    sheet: Path | None


def run(request: RunRequest, rank_info: RankInfo) -> Finished:
    """Generates this rank's share of what is asked for. Raises PromptError or ConfigError before
    anything is written."""
    source = request.source
    output = request.output.absolute()
    above = next(path for path in (output, *output.parents) if os.path.exists(path))
    if not above.is_dir():
        raise ConfigError(f"--output {request.output}: {above} is a file")
    plan = ImagePlan(
        RunSettings(
            model=source.model_fingerprint(),
            scheduler=request.scheduler,
            dtype=request.dtype,
            defaults=request.defaults,
            loras=tuple((fingerprint(file), strength) for file, strength in source.loras),
            controlnet=source.controlnet_fingerprint(),
            rounds_down=request.rounds_down,
        )
    )
    records = [plan.named(record) for record in request.records]
    job = Job(
        records,
        plan,
        request.output,
        # Prompts that come one by one into the same folder keep their sheets.
        "contact_sheet.png" if request.is_list else f"{records[0].id}-sheet.png",
        request.batch_size,
        rank_info.rank,
        rank_info.world_size,
    )

    def open_model() -> ImageGenerator:
        # Imported here: what is wrong with the prompts is said before libraries are loaded.
        from megatron_kosmosg.inference.open_model import open_generator
        from megatron_kosmosg.parallel.platform import torch_dtype

        dtype = torch_dtype(request.dtype)
        image_generator = open_generator(source, request.scheduler, dtype, request.device)
        image_generator.show_steps(not request.is_list and sys.stderr.isatty())
        return image_generator

    with Progress("", "image", is_shown=rank_info.rank == 0) as progress:
        drawn = generate(job, open_model, progress)
    return Finished(drawn, progress.total - drawn, write_sheet(job, request.sheet_rows))
