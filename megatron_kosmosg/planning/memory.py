"""Bytes on a rank of each kind: parameters, gradients, optimizer, activations, U-Net, overhead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.world import WorldLayout
from megatron_kosmosg.models.pipeline_pieces import StagePieces
from megatron_kosmosg.planning.activations import ELEMENT_BYTES, stage_activations
from megatron_kosmosg.planning.diffusion_memory import (
    KEPT_WITH_RECOMPUTE,
    PEAK_OVER_SAVED,
    unet_bytes,
)
from megatron_kosmosg.planning.gpus import Efficiency
from megatron_kosmosg.planning.model_counts import RankCount, frozen_helpers
from megatron_kosmosg.planning.workload import MicroBatch

GIB = 2**30


@dataclass(frozen=True)
class RankMemory:
    """Peak bytes on one rank."""

    parameters: float
    """In the training precision, trained and frozen."""
    gradients: float
    """float32, for what trains here."""
    optimizer: float
    """float32 copy of the parameters and two Adam moments, this rank's share."""
    activations: float
    """Of all micro-batches in flight, and what passes through the layer at work beyond what the
    U-Net, which works at another time, takes anyway."""
    frozen_helpers: float
    """Weights of U-Net and VAE, or of the text encoder."""
    score_activations: float
    """Of the U-Net (or the VAE before it), for the images this rank scores at once."""
    overhead: float
    """CUDA context, NCCL, workspaces, fragmentation."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def tensors(self) -> float:
        """Without the overhead: what a memory tracker sees."""
        return self.total - self.overhead


def decoder_memory(
    config: RunConfig,
    world: WorldLayout,
    pieces: StagePieces,
    pp_rank: int,
    count: RankCount,
    batches: Sequence[MicroBatch],
    efficiency: Efficiency,
) -> RankMemory:
    """Of the ranks of one pipeline stage. batches: the replica's micro-batches of one update."""
    parallel, precision = config.parallel, config.training.precision
    element = ELEMENT_BYTES[precision]
    is_last = pp_rank == world.pp_size - 1
    largest = max(batches, key=lambda batch: (batch.positions, batch.pictures))
    activations = stage_activations(config, pieces, is_last, largest)
    in_flight = min(world.pp_size - pp_rank + _ahead(config, world), len(batches))
    sharing = world.num_replicas if parallel.use_distributed_optimizer else 1
    master_copy = 4 if precision != "fp32" else 0  # fp32 parameters are their own master copy
    helpers = is_last and not world.score_ranks_per_unit
    helper_bytes, score_bytes = 0.0, 0.0
    if helpers and config.stage == "align":
        helper_bytes = frozen_helpers(config)["clip_text"] * min(element, 4)
    if helpers and config.stage == "instruct":
        helper_bytes = sum(frozen_helpers(config).values()) * element
        score_bytes = _score_activations(config, -(-largest.images // world.tp_size))
    tensors = (
        count.gradient_elements * element + count.frozen * element,
        count.gradient_elements * 4,
        count.gradient_elements / sharing * (8 + master_copy),
        # The decoder's backward starts when the U-Net's is over: the larger of the two counts.
        activations.saved * in_flight + max(0, activations.passing - score_bytes),
        helper_bytes,
        score_bytes,
    )
    return RankMemory(*tensors, overhead=_overhead(sum(tensors), efficiency))


def score_memory(config: RunConfig, rows: int, efficiency: Efficiency) -> RankMemory:
    """Of a dedicated score rank that takes `rows` images at once."""
    weights = sum(frozen_helpers(config).values()) * ELEMENT_BYTES[config.training.precision]
    activations = _score_activations(config, rows)
    overhead = _overhead(weights + activations, efficiency)
    return RankMemory(0, 0, 0, 0, weights, activations, overhead)


def _ahead(config: RunConfig, world: WorldLayout) -> int:
    """Micro-batches beyond Megatron's own that wait for a dedicated score rank."""
    return config.score.window - 1 if world.score_ranks_per_unit else 0


def _score_activations(config: RunConfig, rows: int) -> float:
    saved, feature_map = unet_bytes(
        config.model.diffusion.path,
        config.data.target_image_size,
        config.model.aligner.num_queries,
    )
    scale = ELEMENT_BYTES[config.training.precision] / ELEMENT_BYTES["fp32"]
    share = KEPT_WITH_RECOMPUTE if config.score.recompute else 1.0
    # The VAE runs before the U-Net; about four maps of its widest level are alive at once.
    encoding = 0 if config.data.latent_cache is not None else 4 * feature_map
    return rows * scale * max(saved * PEAK_OVER_SAVED * share, encoding)


def _overhead(tensors: float, efficiency: Efficiency) -> float:
    return efficiency.overhead_gib * GIB + efficiency.fragmentation * tensors
