"""Score ranks of other jobs that join a run, on GPUs of any kind: which, and what they cost it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.rank_grid import RankGrid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.planning import communication as comm
from megatron_kosmosg.planning.fleet_timeline import FleetTimeline, Servers, play_fleet
from megatron_kosmosg.planning.gpus import GPUS, Efficiency, Gpu, gpu_named
from megatron_kosmosg.planning.memory import GIB, score_memory
from megatron_kosmosg.planning.pipeline_stage_cost import PipelineStageCost, score_seconds
from megatron_kosmosg.planning.rates import Rates
from megatron_kosmosg.planning.workload import ScoreShare


@dataclass(frozen=True)
class JoinedRanks:
    """Score ranks outside the job, on GPUs of one kind."""

    count: int
    gpu: Gpu


@dataclass(frozen=True)
class JoinedEstimate:
    """What they do in one update."""

    joined: JoinedRanks
    seconds: float
    """That one takes for a request."""
    idle: float
    """Share of the update that one has nothing to do."""
    answered: float
    """Share of all requests that they answer."""
    bytes_a_rank: float
    """Conditions and gradients of an update, both ways."""
    memory_gib: float
    fits: bool
    """With `memory_error` to spare."""


def joined_ranks(text: str) -> tuple[JoinedRanks, ...]:
    """Those of `--score-ranks`: COUNTxGPU, several with commas between them.

    GPU is a name as `gpu_named` takes it, or one without its memory where the card is sold in one
    size. Raises ConfigError.
    """
    found = []
    for part in text.split(","):
        count, sign, name = part.strip().partition("x")
        if not sign or not name or not count.isascii() or not count.isdigit() or int(count) < 1:
            raise ConfigError(
                f"--score-ranks {text}: {part.strip()!r} is not COUNTxGPU with a count of 1 or "
                f"more, as 64xl40s-48 or 8xmy_card.yaml; GPUs: {', '.join(GPUS)}"
            )
        try:
            found.append(JoinedRanks(int(count), _card(name)))
        except ConfigError as error:
            raise ConfigError(f"--score-ranks {text}: {error}") from None
    return tuple(found)


def _card(name: str) -> Gpu:
    sizes = [gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] == name]
    return sizes[0] if len(sizes) == 1 else gpu_named(name)


@dataclass(frozen=True)
class JoinedPlay:
    """The update of all replicas of a run that others have joined, played through."""

    timeline: FleetTimeline
    joined: Sequence[JoinedRanks]
    servers: list[Servers]
    """The same, as the timeline knows them."""
    requests: float
    """Of all replicas in an update."""

    def estimates(
        self, config: RunConfig, scored: ScoreShare, seconds: float, efficiency: Efficiency
    ) -> list[JoinedEstimate]:
        """What those that joined do, where the whole update takes `seconds`."""
        memory = score_memory(config, scored.images, efficiency).total
        traffic = comm.score_link_traffic(config, scored.images)
        found = []
        for one, server, busy in zip(self.joined, self.servers, self.timeline.busy, strict=True):
            answers = busy / server.seconds
            estimate = JoinedEstimate(
                joined=one,
                seconds=server.seconds,
                idle=1 - busy / seconds,
                answered=answers * one.count / self.requests,
                bytes_a_rank=answers * traffic.sent,
                memory_gib=memory / GIB,
                fits=memory * (1 + efficiency.memory_error) <= one.gpu.memory_gib * GIB,
            )
            found.append(estimate)
        return found


def play_joined(
    config: RunConfig,
    world: RankGrid,
    costs: Sequence[PipelineStageCost],
    scored: ScoreShare,
    rates: Rates,
    joined: Sequence[JoinedRanks],
) -> JoinedPlay:
    """Raises ConfigError where a GPU lacks the run's precision."""
    servers = [_servers(config, scored, rates, one) for one in joined]
    units = world.num_replicas // world.replicas_per_unit
    alike = math.gcd(units, *(one.count for one in joined))
    parts = -(-config.training.micro_batch_size // scored.images)  # requests of a micro-batch
    timeline = play_fleet(
        [cost.forward for cost in costs],
        [cost.backward for cost in costs],
        unit_servers(config, world, scored, rates),
        [Servers(one.count // alike, one.seconds, one.link) for one in servers],
        units=units // alike,
        replicas=world.replicas_per_unit,
        parts=parts,
        ahead=config.score.window - 1,
    )
    requests = world.num_replicas * len(costs[0].forward) * parts
    return JoinedPlay(timeline, joined, servers, requests)


def unit_servers(config: RunConfig, world: RankGrid, scored: ScoreShare, rates: Rates) -> Servers:
    """The score ranks of the job in a unit, that has some."""
    wire = comm.group_gb_s(list(range(world.unit_size)), rates.gpu)
    link = comm.score_link_seconds(config, scored.images, wire, rates.efficiency) / 2
    seconds = score_seconds(config, scored.images, rates)
    return Servers(world.score_ranks_per_unit, seconds, link)


def _servers(config: RunConfig, scored: ScoreShare, rates: Rates, joined: JoinedRanks) -> Servers:
    joined_rates = Rates(joined.gpu, rates.precision, rates.efficiency)
    network = min(rates.gpu.network_gb_s, joined.gpu.network_gb_s)
    link = comm.score_link_seconds(config, scored.images, network, rates.efficiency) / 2
    return Servers(joined.count, score_seconds(config, scored.images, joined_rates), link)
