"""Which rank does what among `world_size` ranks: arithmetic alone, for planning and for training.

colocated: world = replicas x tensor x pipeline, in Megatron's order (tensor ranks adjacent,
pipeline stages furthest apart). dedicated: ranks come in units that stay together on a node. A
unit is score.replicas_per_rank decoder replicas, each pipeline stage by pipeline stage, and then
its score ranks: world = replicas x (tensor x pipeline + score.ranks_per_replica), or, when replicas
share a score rank, world = units x (score.replicas_per_rank x tensor x pipeline + 1).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import ParallelConfig, RunConfig

_LARGEST_RATIO = 8
"""Largest score.ranks_per_replica or score.replicas_per_rank that an error message proposes."""


@dataclass(frozen=True)
class RankCoordinates:
    """The role of one rank, and its coordinates in that role."""

    role: Literal["decoder", "score"]
    """`decoder` ranks train; `score` ranks hold the frozen U-Net alone."""
    replica: int
    """Its decoder replica; of a score rank, the first that it serves."""
    pp_rank: int = 0
    tp_rank: int = 0
    score_index: int = 0
    """Which of its unit's score ranks; 0 for decoder ranks."""


@dataclass(frozen=True)
class RankGrid:
    """The roles of all ranks of a run."""

    world_size: int
    tp_size: int
    pp_size: int
    num_replicas: int
    """Decoder replicas: the data-parallel size."""
    score_ranks_per_unit: int
    """0 where the U-Net is colocated."""
    replicas_per_unit: int
    """Replicas that share score ranks; 1 where the U-Net is colocated."""

    @property
    def replica_size(self) -> int:
        """Number of decoder ranks in one replica."""
        return self.tp_size * self.pp_size

    @property
    def unit_size(self) -> int:
        """Ranks of one unit: its replicas and their score ranks."""
        return self.replicas_per_unit * self.replica_size + self.score_ranks_per_unit

    @property
    def num_score_ranks(self) -> int:
        """Number of score ranks in the whole run."""
        return self.world_size - self.num_replicas * self.replica_size

    def decoder_rank(self, replica: int, pp_rank: int, tp_rank: int) -> int:
        """The global rank of the decoder rank with these coordinates."""
        if not self.score_ranks_per_unit:
            return tp_rank + self.tp_size * (replica + self.num_replicas * pp_rank)
        unit, inside = divmod(replica, self.replicas_per_unit)
        return unit * self.unit_size + inside * self.replica_size + self.tp_size * pp_rank + tp_rank

    def score_ranks(self, replica: int) -> list[int]:
        """The score ranks that serve a replica, in the order of its micro-batches."""
        unit = replica // self.replicas_per_unit
        first = unit * self.unit_size + self.replicas_per_unit * self.replica_size
        return list(range(first, first + self.score_ranks_per_unit))

    def coordinates(self, rank: int) -> RankCoordinates:
        """The role and coordinates of `rank`; the inverse of `decoder_rank` and `score_ranks`."""
        if not self.score_ranks_per_unit:
            rest, tp_rank = divmod(rank, self.tp_size)
            pp_rank, replica = divmod(rest, self.num_replicas)
            return RankCoordinates("decoder", replica, pp_rank, tp_rank)
        unit, inside = divmod(rank, self.unit_size)
        decoder_ranks = self.replicas_per_unit * self.replica_size
        first = unit * self.replicas_per_unit
        if inside >= decoder_ranks:
            return RankCoordinates("score", first, score_index=inside - decoder_ranks)
        replica, inside = divmod(inside, self.replica_size)
        pp_rank, tp_rank = divmod(inside, self.tp_size)
        return RankCoordinates("decoder", first + replica, pp_rank, tp_rank)

    def tensor_group(self, replica: int, pp_rank: int) -> list[int]:
        """Ranks that split the layers of one pipeline stage."""
        return [self.decoder_rank(replica, pp_rank, tp) for tp in range(self.tp_size)]

    def pipeline_group(self, replica: int, tp_rank: int) -> list[int]:
        """Ranks that hold the pipeline stages of one replica, in order."""
        return [self.decoder_rank(replica, pp, tp_rank) for pp in range(self.pp_size)]

    def data_group(self, pp_rank: int, tp_rank: int) -> list[int]:
        """Ranks that hold the same parameters, one of each replica."""
        return [self.decoder_rank(r, pp_rank, tp_rank) for r in range(self.num_replicas)]


def has_score_ranks(config: RunConfig) -> bool:
    """Whether the frozen U-Net has ranks of its own. score.placement speaks of `instruct` alone;
    the other stages have no U-Net, and a config that they share may say what it likes."""
    return config.stage == "instruct" and config.score.placement == "dedicated"


def rank_grid(config: RunConfig, world_size: int) -> RankGrid:
    """The layout of `world_size` ranks.

    Raises ConfigError, with the nearest choices that fit, when they cannot all be used.
    """
    parallel, score = config.parallel, config.score
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if not has_score_ranks(config):
        return RankGrid(world_size, tp, pp, _colocated_replicas(config, world_size), 0, 1)
    for key, value in (
        ("ranks_per_replica", score.ranks_per_replica),
        ("replicas_per_rank", score.replicas_per_rank),
        ("window", score.window),
    ):
        if value < 1:
            raise ConfigError(f"score.{key}={value} must be at least 1")
    if score.ranks_per_replica > 1 and score.replicas_per_rank > 1:
        raise ConfigError(
            f"score.ranks_per_replica={score.ranks_per_replica} and "
            f"score.replicas_per_rank={score.replicas_per_rank} contradict each other; "
            "set one of them to 1"
        )
    unit = score.replicas_per_rank * tp * pp + score.ranks_per_replica
    if world_size % unit:
        raise ConfigError(_cannot_fill(config, world_size, unit))
    return RankGrid(
        world_size=world_size,
        tp_size=tp,
        pp_size=pp,
        num_replicas=world_size // unit * score.replicas_per_rank,
        score_ranks_per_unit=score.ranks_per_replica,
        replicas_per_unit=score.replicas_per_rank,
    )


def _colocated_replicas(config: RunConfig, world_size: int) -> int:
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % ranks:
        raise ConfigError(
            f"{world_size} ranks cannot be split into copies of "
            f"parallel.tensor_model_parallel_size ({parallel.tensor_model_parallel_size}) x "
            f"parallel.pipeline_model_parallel_size "
            f"({parallel.pipeline_model_parallel_size}) = {ranks} ranks; "
            f"start {neighbours(world_size, ranks)} ranks or change the two sizes"
        )
    return world_size // ranks


def _cannot_fill(config: RunConfig, world_size: int, unit: int) -> str:
    score, parallel = config.score, config.parallel
    replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    instead = ""
    for key, many, unit_of in (
        ("ranks_per_replica", score.replicas_per_rank == 1, lambda k: replica + k),
        ("replicas_per_rank", score.ranks_per_replica == 1, lambda r: r * replica + 1),
    ):
        ratios = range(1, _LARGEST_RATIO + 1) if many else ()
        fitting = " or ".join(str(n) for n in ratios if world_size % unit_of(n) == 0)
        instead += f"set score.{key} to {fitting}, " if fitting else ""
    return (
        f"{world_size} ranks cannot be split into units of score.replicas_per_rank "
        f"({score.replicas_per_rank}) x tensor ({parallel.tensor_model_parallel_size}) x pipeline "
        f"({parallel.pipeline_model_parallel_size}) decoder ranks + score.ranks_per_replica "
        f"({score.ranks_per_replica}) = {unit} ranks; start {neighbours(world_size, unit)} ranks, "
        f"{instead}or set score.placement=colocated"
    )


def single_process_config(config: RunConfig) -> RunConfig:
    """The config of the same model whole on one rank, the U-Net beside the decoder, whatever layout
    its run was trained with."""
    score = dataclasses.replace(config.score, placement="colocated")
    return dataclasses.replace(config, parallel=ParallelConfig(), score=score)


def divisors(value: int) -> list[int]:
    """All numbers that divide a positive number, ascending."""
    return [number for number in range(1, value + 1) if value % number == 0]


def neighbours(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, for a message: `24 or 32`; the lower one unless 0."""
    lower = value // unit * unit
    return f"{lower} or {lower + unit}" if lower else f"{unit}"
