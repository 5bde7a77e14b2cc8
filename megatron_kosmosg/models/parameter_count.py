"""The real modules of a model without memory (meta device), to ask for names, shapes and counts."""

from __future__ import annotations

import dataclasses

import torch

from megatron_kosmosg.config.schema import ParallelConfig, RunConfig
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel.context import single_process_context


def meta_model(config: RunConfig, output_head: bool, aligner_parts: tuple[str, ...]) -> KosmosG:
    """The whole model on one rank, on the meta device."""
    alone = dataclasses.replace(config, parallel=ParallelConfig())
    return KosmosG(
        alone,
        single_process_context(torch.device("meta")),
        output_head=output_head,
        aligner_parts=aligner_parts,
    )
