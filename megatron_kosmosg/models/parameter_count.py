"""How many parameters a model has, from its real modules built without memory (meta device)."""

from __future__ import annotations

import dataclasses

import torch

from megatron_kosmosg.config.schema import ParallelConfig, RunConfig
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel.layout import lone_layout

PARTS = ("embedding", "decoder", "vision_encoder", "resampler", "aligner_m", "aligner_n")


def count_parameters(
    config: RunConfig, output_head: bool, aligner_parts: tuple[str, ...]
) -> dict[str, int]:
    """Parameters of each part and, as "total", of all; without vocabulary padding.

    The tied output head adds nothing to the embedding.
    """
    model = meta_model(config, output_head, aligner_parts)
    counts = {}
    for part in PARTS:
        module = getattr(model, part)
        if module is not None:
            counts[part] = sum(parameter.numel() for parameter in module.parameters())
    rows, width = model.embedding.word_embeddings.weight.shape
    counts["embedding"] -= (rows - config.model.vocab_size) * width
    return counts | {"total": sum(counts.values())}


def meta_model(config: RunConfig, output_head: bool, aligner_parts: tuple[str, ...]) -> KosmosG:
    """The whole model on one rank, on the meta device."""
    alone = dataclasses.replace(config, parallel=ParallelConfig())
    return KosmosG(
        alone,
        lone_layout(torch.device("meta")),
        output_head=output_head,
        aligner_parts=aligner_parts,
    )
