"""The kinds of rank of a layout: one for every pipeline stage, and dedicated score ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.world import WorldLayout
from megatron_kosmosg.planning.gpus import Efficiency
from megatron_kosmosg.planning.memory import RankMemory, decoder_memory, score_memory
from megatron_kosmosg.planning.model_counts import ModelShares, RankCount
from megatron_kosmosg.planning.workload import MicroBatch


@dataclass(frozen=True)
class RankKind:
    """Ranks that do the same."""

    name: str
    holds: str
    count: int
    parameters: RankCount | None
    """None for score ranks."""
    memory: RankMemory


@dataclass(frozen=True)
class ScoreShare:
    """What a dedicated score rank gets of a micro-batch."""

    images: int
    """At once."""
    groups: int
    """Score ranks, or sets of them, that work on different micro-batches."""
    used: float
    """Share of the unit's score ranks' time that its images take, were all ranks to work."""


def score_share(config: RunConfig, world: WorldLayout, num_microbatches: int) -> ScoreShare:
    """Whole micro-batches in turn; all ranks share the rows of one where there are fewer."""
    images, ranks = config.training.micro_batch_size, world.score_ranks_per_unit
    if num_microbatches >= ranks:
        return ScoreShare(images, max(ranks, 1), 1.0)
    largest = -(-images // ranks)
    return ScoreShare(largest, 1, images / (largest * ranks))


def rank_kinds(
    config: RunConfig,
    world: WorldLayout,
    shares: ModelShares,
    batches: Sequence[MicroBatch],
    efficiency: Efficiency,
) -> list[RankKind]:
    """In the order of the pipeline, score ranks last. batches: of one replica in one update."""
    found = [
        RankKind(
            name=f"decoder_stage_{stage}" if world.pp_size > 1 else "decoder",
            holds=held.pieces,
            count=world.num_replicas * world.tp_size,
            parameters=held,
            memory=decoder_memory(config, world, piece, stage, held, batches, efficiency),
        )
        for stage, (piece, held) in enumerate(zip(shares.pieces, shares.counts, strict=True))
    ]
    if world.score_ranks_per_unit:
        memory = score_memory(config, score_share(config, world, len(batches)).images, efficiency)
        found.append(RankKind("score", "U-Net and VAE", world.num_score_ranks, None, memory))
    return found
