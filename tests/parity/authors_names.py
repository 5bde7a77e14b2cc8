"""Our parameters made of the authors' tensors, through the table that imports their checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from megatron_kosmosg.config.schema import (
    AlignerConfig,
    DecoderConfig,
    ModelConfig,
    ResamplerConfig,
)
from megatron_kosmosg.conversion.authors import authors_table
from megatron_kosmosg.conversion.rules import RuleTable
from megatron_kosmosg.conversion.stored_names import EMBEDDING


def from_authors(
    name: str, shape: torch.Size, theirs: Mapping[str, torch.Tensor], heads: int
) -> tuple[torch.Tensor, list[str]]:
    """Our parameter (or its gradient) made of the authors' tensors, and their names.

    heads: attention heads of the stack that the parameter belongs to; shape: ours, with padding.
    """
    vocab_size = len(theirs["gpt_model.decoder.embed_tokens.weight"]) if name == EMBEDDING else 0
    names, make = _table(vocab_size, heads).ours_from(name)
    value = make([theirs[their_name] for their_name in names])
    padding = value.new_zeros(shape[0] - value.shape[0], *shape[1:])
    return (torch.cat([value, padding]) if len(padding) else value), names


@functools.cache
def _table(vocab_size: int, heads: int) -> RuleTable:
    return authors_table(
        ModelConfig(
            vocab_size=vocab_size,
            decoder=DecoderConfig(num_attention_heads=heads),
            resampler=ResamplerConfig(num_attention_heads=heads),
            aligner=AlignerConfig(num_attention_heads=heads),
        )
    )
