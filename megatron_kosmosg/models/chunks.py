"""This rank's pipeline stages, and what each knows of those before it.

One pipeline stage a rank; with parallel.virtual_pipeline_model_parallel_size that many
(interleaving).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.models.pipeline_stage_specs import chunks_per_rank
from megatron_kosmosg.parallel.context import ParallelContext


def build_chunks(
    config: RunConfig,
    context: ParallelContext,
    *,
    output_head: bool,
    aligner_parts: tuple[str, ...] = (),
) -> list[KosmosG]:
    """The parts of the model on this rank, first to last; arguments as of KosmosG."""
    return [
        KosmosG(config, context, output_head=output_head, aligner_parts=aligner_parts, chunk=chunk)
        for chunk in range(chunks_per_rank(config))
    ]


def agree_on_freezing(chunks: Sequence[KosmosG], context: ParallelContext) -> None:
    """Tell every pipeline stage whether anything before it trains. Call on all ranks.

    Without this call results are the same, but the backward of frozen layers is computed. On the
    meta device, where nothing is computed, it does nothing.
    """
    if context.pp_size == 1 or context.device.type == "meta":
        return
    trains = torch.tensor(
        [chunk.trains for chunk in chunks], dtype=torch.uint8, device=context.device
    )
    everyone = trains.new_empty(context.pp_size * len(chunks))
    torch.distributed.all_gather_into_tensor(everyone, trains, group=context.pp_group)
    in_model_order = everyone.view(context.pp_size, len(chunks)).T.flatten()
    for index, chunk in enumerate(chunks):
        before = in_model_order[: index * context.pp_size + context.pp_rank]
        chunk.set_upstream_frozen(not before.any().item())
