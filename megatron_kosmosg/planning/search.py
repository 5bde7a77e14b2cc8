"""Valid layouts of a stage, best first; by formulae alone.

Recomputation (of the decoder's layers, of the U-Net) is tried only where a layout does not fit
without, since it never makes one faster. Long because the settings that a search varies stand
beside the search that varies them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.rank_grid import RankGrid, rank_grid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.stage_facts import StageFacts
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.planning.estimate import Estimate, estimate
from megatron_kosmosg.planning.gpus import Efficiency, Gpu
from megatron_kosmosg.planning.joined import JoinedRanks
from megatron_kosmosg.planning.memory import GIB
from megatron_kosmosg.planning.model_counts import ModelShares, model_shares
from megatron_kosmosg.planning.pipeline_balance import balanced_layout
from megatron_kosmosg.stages import stage_facts

TENSOR = (1, 2, 4, 8)
PIPELINE = (1, 2, 4)
PLACEMENTS = [("colocated", 1, 1)] + [("dedicated", k, 1) for k in range(1, 9)]
PLACEMENTS += [("dedicated", 1, r) for r in range(2, 9)]
"""(placement, score ranks of a replica, replicas of a score rank)."""
WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)
"""With dedicated score ranks; wider than a replica has micro-batches changes nothing."""
LARGEST_MICRO_BATCH = 64
MOST_MICRO_BATCHES = 64
"""Of a replica in an update."""
_SMALL_WORLD = 16
"""On fewer GPUs a replica may have more: its share is larger, and memory may forbid larger ones."""


@dataclass(frozen=True)
class LayoutChoice:
    """A value for each of the settings that a search varies."""

    tensor: int
    pipeline: int
    pipeline_layout: str | None
    placement: str
    ranks_per_replica: int
    replicas_per_rank: int
    window: int
    micro_batch_size: int
    recompute: str
    score_recompute: bool
    cached_latents: bool

    @property
    def score(self) -> str:
        """Placement and ratio of score ranks in short."""
        if self.placement == "colocated":
            return "colocated"
        if self.replicas_per_rank > 1:
            return f"dedicated 1 for {self.replicas_per_rank}"
        return f"dedicated {self.ranks_per_replica}"

    def overrides(self, facts: StageFacts) -> list[str]:
        """Settings of a stage for the command line of training and of this tool."""
        lines = [
            f"parallel.tensor_model_parallel_size={self.tensor}",
            f"parallel.sequence_parallel={str(self.tensor > 1).lower()}",
            f"parallel.pipeline_model_parallel_size={self.pipeline}",
            "parallel.use_distributed_optimizer=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
            f"training.micro_batch_size={self.micro_batch_size}",
            f"training.recompute={self.recompute}",
        ]
        if self.pipeline_layout is not None:
            lines.append(f"parallel.pipeline_layout={self.pipeline_layout}")
        if facts.has_unet:
            lines += [
                f"score.placement={self.placement}",
                f"score.ranks_per_replica={self.ranks_per_replica}",
                f"score.replicas_per_rank={self.replicas_per_rank}",
                f"score.window={self.window}",
                f"score.recompute={str(self.score_recompute).lower()}",
                f"data.latent_cache={'latents' if self.cached_latents else 'null'}",
            ]
        return lines


def with_choice(config: RunConfig, choice: LayoutChoice, world_size: int) -> RunConfig:
    """The config with the settings of a choice; exchanges overlap wherever there are replicas."""
    return replace(
        config,
        parallel=replace(
            config.parallel,
            world_size=world_size,
            tensor_model_parallel_size=choice.tensor,
            pipeline_model_parallel_size=choice.pipeline,
            virtual_pipeline_model_parallel_size=None,
            sequence_parallel=choice.tensor > 1,
            pipeline_layout=choice.pipeline_layout,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        score=replace(
            config.score,
            placement=choice.placement,
            ranks_per_replica=choice.ranks_per_replica,
            replicas_per_rank=choice.replicas_per_rank,
            window=choice.window,
            recompute=choice.score_recompute,
        ),
        training=replace(
            config.training,
            micro_batch_size=choice.micro_batch_size,
            recompute=choice.recompute,
        ),
        data=replace(
            config.data,
            latent_cache=(config.data.latent_cache or "latents") if choice.cached_latents else None,
        ),
    )


@dataclass(frozen=True)
class Candidate:
    choice: LayoutChoice
    config: RunConfig
    estimate: Estimate

    @property
    def samples_per_second(self) -> float:
        return self.config.training.global_batch_size / self.estimate.seconds

    @property
    def largest_memory_gib(self) -> float:
        """Memory of the kind of rank that holds most, in GiB."""
        return max(kind.memory.total for kind in self.estimate.kinds) / GIB


class NothingFits(ConfigError):
    """No layout fits: the search has no result."""


@dataclass(frozen=True)
class SearchResult:
    candidates: list[Candidate]
    """Those that fit, fastest first."""
    num_tried: int
    num_too_large: int
    """Layouts that do not fit the GPU's memory even with recomputation."""


def search(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    efficiency: Efficiency,
    model: torch.nn.Module,
    joined: Sequence[JoinedRanks] = (),
) -> SearchResult:
    """Estimates all valid layouts of `config` on `world_size` GPUs, best first; those with score
    ranks beside the ones that `joined`. Raises NothingFits when none is left."""
    fitting, tried, too_large = [], 0, []
    estimator = _Estimator(world_size, gpu, efficiency, model, joined)
    for choices in _choices(config, world_size):
        for choice in choices:  # with ever more recomputation
            candidate = estimator.candidate(config, choice)
            if candidate is None or candidate.estimate.fits:
                break
        if candidate is None:
            continue  # indivisible: not a layout
        tried += 1
        if candidate.estimate.fits:
            fitting.append(candidate)
        else:
            too_large.append(candidate)
    if not fitting:
        raise NothingFits(_nothing_fits(config, world_size, gpu, efficiency, too_large))
    fitting.sort(key=lambda c: (c.estimate.seconds, c.choice.tensor * c.choice.pipeline))
    return SearchResult(fitting, tried, len(too_large))


def _nothing_fits(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    efficiency: Efficiency,
    too_large: list[Candidate],
) -> str:
    batch = config.training.global_batch_size
    where = f"stage={config.stage} on {world_size} x {gpu.name}"
    if not too_large:
        return f"no layout of {where} divides training.global_batch_size={batch}"
    least = min(too_large, key=lambda candidate: candidate.largest_memory_gib)
    return (
        f"no layout of {where} fits: the smallest of {len(too_large)} needs "
        f"{least.largest_memory_gib:.1f} GiB a rank (tensor {least.choice.tensor}, pipeline "
        f"{least.choice.pipeline}, micro-batch {least.choice.micro_batch_size}, all recomputed) of "
        f"{gpu.memory_gib:g}, with {efficiency.memory_error:.0%} kept free"
    )


def _choices(config: RunConfig, world_size: int) -> Iterator[list[LayoutChoice]]:
    """Layouts, each as a list with ever more recomputation."""
    has_unet = stage_facts(config.stage).has_unet
    placements = PLACEMENTS if has_unet else PLACEMENTS[:1]
    caches = (True, False) if has_unet else (False,)
    for tp, pp, (placement, k, r) in itertools.product(TENSOR, PIPELINE, placements):
        if tp * pp > 8 or tp * pp * r + (k if placement == "dedicated" else 0) > world_size:
            continue
        base = LayoutChoice(tp, pp, None, placement, k, r, WINDOWS[0], 1, "none", False, False)
        try:
            world = rank_grid(with_choice(config, base, world_size), world_size)
        except ConfigError:
            continue
        for size, cached in itertools.product(
            _micro_batch_sizes(config, world.num_replicas, world_size), caches
        ):
            unbalanced = replace(base, micro_batch_size=size, cached_latents=cached)
            layout = balanced_layout(with_choice(config, unbalanced, world_size))
            for window in _windows(config, world, size):
                yield [
                    replace(
                        unbalanced,
                        pipeline_layout=layout,
                        window=window,
                        recompute=recompute,
                        score_recompute=again,
                    )
                    for recompute, again in _recomputations(has_unet)
                ]


def _recomputations(has_unet: bool) -> list[tuple[str, bool]]:
    if not has_unet:
        return [("none", False), ("full", False)]
    return [("none", False), ("none", True), ("full", False), ("full", True)]


def _micro_batch_sizes(config: RunConfig, replicas: int, world_size: int) -> list[int]:
    rows, rest = divmod(config.training.global_batch_size, replicas)
    if rest or not rows:
        return []
    largest = min(rows, LARGEST_MICRO_BATCH)
    most = max(MOST_MICRO_BATCHES, _SMALL_WORLD * MOST_MICRO_BATCHES // world_size)
    return [
        size for size in range(1, largest + 1) if rows % size == 0 and rows // size <= most
    ]  # fmt: skip


def _windows(config: RunConfig, world: RankGrid, micro_batch_size: int) -> list[int]:
    if not world.score_ranks_per_unit:
        return [2]
    count = config.training.global_batch_size // world.num_replicas // micro_batch_size
    return [window for window in WINDOWS if window <= count] or [1]


class _Estimator:
    """Estimates choices; how a model is spread is counted once for every tensor and pipeline."""

    def __init__(
        self,
        world_size: int,
        gpu: Gpu,
        efficiency: Efficiency,
        model: torch.nn.Module,
        joined: Sequence[JoinedRanks],
    ) -> None:
        self._world_size, self._gpu, self._efficiency = world_size, gpu, efficiency
        self._model, self._joined = model, joined
        self._shares: dict[tuple, ModelShares] = {}

    def candidate(self, config: RunConfig, choice: LayoutChoice) -> Candidate | None:
        """The choice with its estimate; None where its numbers do not divide."""
        planned = with_choice(config, choice, self._world_size)
        key = (choice.tensor, choice.pipeline, choice.pipeline_layout, choice.placement)
        try:
            world = rank_grid(planned, self._world_size)
            validate_layout(planned, self._world_size, stage_facts(planned.stage))
            if key not in self._shares:
                self._shares[key] = model_shares(planned, self._model)
            shares = self._shares[key]
            found = estimate(planned, world, self._gpu, self._efficiency, shares, self._joined)
        except ConfigError:
            return None
        return Candidate(choice, planned, found)
