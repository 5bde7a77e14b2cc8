"""The model of a stage: which parts it has, and which of them train."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.stage_facts import StageFacts
from megatron_kosmosg.models.chunks import agree_on_freezing, build_chunks
from megatron_kosmosg.models.faster_passes import compile_frozen_blocks
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.models.lora import ADAPTERS
from megatron_kosmosg.parallel.context import ParallelContext


def build_frozen(facts: StageFacts, config: RunConfig, context: ParallelContext) -> list[KosmosG]:
    """This rank's chunks of the model that `facts` describe, frozen but for what trains.

    All ranks call this together.
    """
    chunks = build_chunks(
        config, context, output_head=facts.has_output_head, aligner_parts=facts.aligner_parts
    )
    has_adapters = config.lora.rank > 0
    trained = config.lora.trains if has_adapters else facts.trained
    train_only(chunks, trained, context, adapters=has_adapters)
    if config.performance.compile == "regional" and "vision_encoder" in trained:
        for chunk in chunks:
            if chunk.vision_encoder is not None:
                compile_frozen_blocks(chunk.vision_encoder, config)
    return chunks


def train_only(
    chunks: list[KosmosG], names: Iterable[str], context: ParallelContext, *, adapters: bool = False
) -> list[KosmosG]:
    """The chunks, frozen except for the parts of these names (as in `StageFacts.trained`) and,
    where asked for, the decoder's adapters.

    A part held elsewhere is left out. All ranks call this together: pipeline stages learn whether
    anything before them trains.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        for part in (part for name in names for part in _parts(chunk, name)):
            part.requires_grad_(True)
        for name, parameter in chunk.named_parameters() if adapters else ():
            if name.endswith(ADAPTERS):
                parameter.requires_grad_(True)
    agree_on_freezing(chunks, context)
    return chunks


def _parts(chunk: KosmosG, name: str) -> list[nn.Module]:
    if name == "vision_encoder":
        return chunk.trainable_vision_modules()
    part = getattr(chunk, name)
    return [] if part is None else [part]
