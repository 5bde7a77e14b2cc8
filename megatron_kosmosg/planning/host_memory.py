"""An upper bound of the machine's own memory that the ranks of a node take, and the size of a
checkpoint.

Most of it is checkpoints: a save gathers the optimizer's float32 states on the hosts of every
replica, and a rank that the kernel kills for want of memory leaves no message. The bound is that
of a start (all ranks read frozen networks, or a checkpoint, at once) or of a save during training,
whichever is larger. Files that are mapped into memory do not count: the kernel takes their pages
back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_kosmosg.config.rank_grid import RankGrid
from megatron_kosmosg.config.saved_weights import saves_trained_alone
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.planning.activations import ELEMENT_BYTES
from megatron_kosmosg.planning.communication import bucket_elements
from megatron_kosmosg.planning.memory import GIB
from megatron_kosmosg.planning.model_counts import ModelShares, RankCount, frozen_helpers
from megatron_kosmosg.planning.workload import MicroBatch, latent_shape
from megatron_kosmosg.stages import stage_facts

PROCESS_BYTES = 3 * 2**30
"""Of a rank that has done nothing: Python, torch, CUDA's part on the host. An assumption."""
DECODED_BYTES = 2 * 3 * 24_000_000
"""Of a photo of 24 megapixels while it is decoded and resized."""
_STATE_BYTES = 12
"""float32 weight and two Adam moments in a checkpoint."""
_AVERAGE_BYTES = 4
_OFFLOADED_BYTES = 4 + 2 * 4 + 2 * 4
"""A weight that the host updates: itself, its moments, and its gradient in pinned memory, which
torch rounds up to a power of two."""
_OFFLOADING_BYTES = 4 + 2 * 2
"""A weight before it is shared out over replicas: float32, and pinned as it was."""


@dataclass(frozen=True)
class HostMemory:
    """The bytes of the machine's own memory that a rank, or a node, takes."""

    programs: float
    optimizer: float
    """States of weights that the host updates."""
    batches: float
    """Read ahead and in the making, pinned copies included."""
    saving: float
    """Beside those, while a checkpoint is written."""
    starting: float
    """Instead of those: frozen networks, or a checkpoint, while they are read."""

    @property
    def total(self) -> float:
        return self.programs + self.optimizer + max(self.batches + self.saving, self.starting)


@dataclass(frozen=True)
class HostPlan:
    ranks: int
    """Of the node."""
    node: HostMemory
    rank: HostMemory
    """That takes most."""
    checkpoint: float
    """Bytes on disk."""
    kept: int | None
    """Checkpoints at a time, the one being written included; None for all."""

    def lines(self) -> list[str]:
        """The plan in lines for people; slurm/checks.sh reads the GiB of a rank from them."""
        gib = {name: value / GIB for name, value in asdict(self.node).items()}
        offloaded = f", optimizer {gib['optimizer']:.1f}" if self.node.optimizer else ""
        several = "" if self.kept is None else f", {self.kept} at a time"
        return [
            f"the machine's memory: at most {math.ceil(self.rank.total / GIB)} GiB a rank, "
            f"{self.node.total / GIB:.0f} GiB on a node of {self.ranks}: programs "
            f"{gib['programs']:.0f}{offloaded}, and batches {gib['batches']:.1f} with a save "
            f"{gib['saving']:.1f}, or a start {gib['starting']:.1f}",
            f"a checkpoint: {self.checkpoint / 1e9:.1f} GB on disk{several}",
        ]

    def as_dict(self) -> dict:
        """{"node_memory_gib": ..., "checkpoint": ...} for the JSON of a plan."""
        gib = {name: value / GIB for name, value in asdict(self.node).items()}
        return {
            "node_memory_gib": gib | {"total": self.node.total / GIB, "ranks": self.ranks},
            "checkpoint": {"gigabytes": self.checkpoint / 1e9, "at_a_time": self.kept},
        }


def plan_host(
    config: RunConfig,
    world: RankGrid,
    shares: ModelShares,
    batches: Sequence[MicroBatch],
    parameters: tuple[int, int],
    per_node: int,
) -> HostPlan:
    """Plans the memory of a node.

    Args:
        batches: the micro-batches of one replica in one update.
        parameters: numbers of those of the whole model that train and that do not, without the
            networks beside it.
        per_node: ranks of a node.
    """
    ranks = min(per_node, world.world_size)
    fullest = _fullest(config, world, shares, batches, ranks)
    sums = zip(*(asdict(memory).values() for memory in fullest), strict=True)
    kept = config.checkpoint.keep_last + 1 if config.checkpoint.keep_last else None
    if config.checkpoint.keep_every:
        kept = None
    return HostPlan(
        ranks, HostMemory(*map(sum, sums)), fullest[0], checkpoint_bytes(config, *parameters), kept
    )


def _fullest(
    config: RunConfig,
    world: RankGrid,
    shares: ModelShares,
    batches: Sequence[MicroBatch],
    number: int,
) -> list[HostMemory]:
    """The ranks that take most: a node may hold just these."""
    kinds = [
        (
            world.num_replicas * world.tp_size,
            _decoder_rank(config, world, pipeline_stage, held, batches),
        )
        for pipeline_stage, held in enumerate(shares.counts)
    ]
    if world.score_ranks_per_unit:
        reads = _batches(config, batches)
        kinds.append(
            (world.num_score_ranks, HostMemory(PROCESS_BYTES, 0, reads, 0, _helpers(config)))
        )
    ranks = [memory for count, memory in kinds for _ in range(min(count, number))]
    return sorted(ranks, key=lambda memory: -memory.total)[:number]


def checkpoint_bytes(config: RunConfig, trained: int, frozen: int) -> float:
    """Size of one checkpoint on disk, all ranks' files together."""
    saved = trained if saves_trained_alone(config) else trained + frozen
    return ELEMENT_BYTES[config.training.precision] * saved + _state_bytes(config) * trained


def _state_bytes(config: RunConfig) -> int:
    return _STATE_BYTES + (_AVERAGE_BYTES if config.optimizer.ema_decay else 0)


def _decoder_rank(
    config: RunConfig,
    world: RankGrid,
    pipeline_stage: int,
    held: RankCount,
    batches: Sequence[MicroBatch],
) -> HostMemory:
    parallel, trained = config.parallel, held.gradient_elements
    element, states = ELEMENT_BYTES[config.training.precision], _state_bytes(config) * trained
    replicas = world.num_replicas
    weights = element * (trained + held.frozen) / replicas  # this rank reads its part of them
    saved = element * trained / replicas if saves_trained_alone(config) else weights
    if parallel.use_distributed_optimizer:
        bucket = bucket_elements(config, world, trained, is_first=pipeline_stage == 0)
        # All states of this rank's weights; first with its own of a bucket and one state of all of
        # the bucket twice, then with what is copied for the writer.
        copied = saved + (states / replicas if config.checkpoint.async_save else 0)
        gathering = _STATE_BYTES * bucket / replicas + 2 * 4 * bucket
        saving = states + max(gathering, copied)
    else:
        saving = saved + states / replicas
    helpers = _helpers(config) if not world.score_ranks_per_unit else 0.0
    settings = config.optimizer
    offloaded = trained * settings.optimizer_offload_fraction * settings.optimizer_cpu_offload
    return HostMemory(
        programs=PROCESS_BYTES,
        optimizer=_OFFLOADED_BYTES * offloaded / replicas,
        batches=_batches(config, batches) / world.tp_size,  # one of them reads for all
        saving=saving,
        starting=max(helpers, states + weights, _OFFLOADING_BYTES * offloaded),
    )


def _helpers(config: RunConfig) -> float:
    return sum(frozen_helpers(config).values()) * ELEMENT_BYTES[config.training.precision]


def _batches(config: RunConfig, batches: Sequence[MicroBatch]) -> float:
    """The bytes of batches that the threads of a reading rank hold."""
    data, facts = config.data, stage_facts(config.stage)
    threads = data.num_workers
    side = config.model.vision.image_size
    targets = 0
    if facts.has_unet:
        latents = math.prod(latent_shape(config)) * 4  # float32
        pixels = 3 * data.target_image_size**2
        targets = 2 * latents + (2 * latents if data.latent_cache is not None else pixels)
    largest = max(
        batch.positions * (8 + 2) + batch.prompt_images * 3 * side**2 + batch.images * targets
        for batch in batches
    )
    read_ahead = max(2, 2 * threads)
    in_the_making = 2 * max(threads, 1)  # samples, and the batch made of them
    return largest * (read_ahead + in_the_making + 1) + DECODED_BYTES * max(threads, 1)
