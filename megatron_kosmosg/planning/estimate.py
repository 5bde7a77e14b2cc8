"""The cost of one update of a layout by formulae alone: seconds, FLOPs, bytes sent, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.rank_grid import RankGrid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.planning import communication as comm
from megatron_kosmosg.planning.gpus import Efficiency, Gpu
from megatron_kosmosg.planning.joined import (
    JoinedEstimate,
    JoinedPlay,
    JoinedRanks,
    play_joined,
    unit_servers,
)
from megatron_kosmosg.planning.launches import update_launches
from megatron_kosmosg.planning.memory import GIB, RankKind, rank_kinds
from megatron_kosmosg.planning.model_counts import ModelShares, RankCount
from megatron_kosmosg.planning.pipeline_stage_cost import (
    PipelineStageCost,
    needed_flops,
    pipeline_stage_cost,
)
from megatron_kosmosg.planning.rates import Rates
from megatron_kosmosg.planning.timeline import Timeline, play
from megatron_kosmosg.planning.workload import MicroBatch, ScoreShare, micro_batches, score_share

_HIDDEN_SHARE = 0.8
"""Share of a pass behind which gradient exchange or parameter gathering hides."""
_OFFLOADED_TRAFFIC = 4 + 4 + 28
"""Bytes of a weight that the host updates: its gradient in, the weight out, and those of AdamW."""
_HOST_SPEED = 20e9
"""Bytes a second that a rank moves so, where eight share a host. An assumption."""


@dataclass(frozen=True)
class Estimate:
    """What one update of a layout costs."""

    world: RankGrid
    num_microbatches: int
    micro_batches: list[MicroBatch]
    kinds: list[RankKind]
    flops: dict[str, float]
    """By module, over all ranks, without recomputation and without repeats on tensor ranks."""
    seconds: float
    parts: dict[str, float]
    """Seconds of a decoder rank: forward, backward, score, tensor, pipeline, launches,
    waiting, data, optimizer, fixed. They add up to `seconds`."""
    bubble: float
    """Share of the schedule that decoder ranks wait, for each other or for score ranks."""
    decoder_idle: float
    """Share of the update that decoder ranks neither compute nor exchange tensor shards."""
    score_idle: float | None
    """The same of dedicated score ranks; None without any."""
    traffic: dict[str, float]
    """Bytes sent by a rank per update, by group; the largest over the kinds of rank."""
    fits: bool
    """On the GPU, with `memory_error` to spare."""
    joined: list[JoinedEstimate]
    """Score ranks of other jobs."""

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


def estimate(
    config: RunConfig,
    world: RankGrid,
    gpu: Gpu,
    efficiency: Efficiency,
    shares: ModelShares,
    joined: Sequence[JoinedRanks] = (),
) -> Estimate:
    """The update of `config` on `world`. shares: `model_counts.model_shares` of `config`.

    joined: score ranks of other jobs, of use to dedicated layouts alone. Raises ConfigError for a
    batch that does not divide, or a precision that a GPU lacks.
    """
    count = num_microbatches(config, world.num_replicas)
    batches = micro_batches(config, count)
    specs, counts = shares.specs, shares.counts
    rates = Rates(gpu, config.training.precision, efficiency)
    dedicated = world.score_ranks_per_unit > 0
    scored = score_share(config, world, count)
    costs = [
        pipeline_stage_cost(config, world, pipeline_stage, spec, batches, gpu, rates)
        for pipeline_stage, spec in enumerate(specs)
    ]
    fleet: JoinedPlay | None = None
    if joined and dedicated:
        fleet = play_joined(config, world, costs, scored, rates, joined)
        timeline: Timeline = fleet.timeline
        score_busy = timeline.score_busy
    else:
        timeline = _timeline(config, world, costs, scored, rates)
        score_busy = timeline.score_busy * scored.used
    data, optimizer, traffic = 0.0, 0.0, []
    for pipeline_stage, (held, cost) in enumerate(zip(counts, costs, strict=True)):
        exchange = comm.data_traffic(config, world, held)
        wire = comm.data_gb_s(world, gpu, pipeline_stage)
        gradients, parameters = (t.seconds(wire, efficiency, world.num_replicas) for t in exchange)
        if config.parallel.overlap_grad_reduce:
            gradients = _exposed(gradients, cost.last_backward)
        if config.parallel.overlap_param_gather:
            parameters = _exposed(parameters, cost.first_forward)
        data = max(data, gradients + parameters)
        kernels = update_launches(config, world, specs[pipeline_stage], held.gradient_elements)
        stepping = rates.launching(kernels)
        stepping = max(stepping, _optimizer_seconds(config, world, held, gpu, efficiency))
        optimizer = max(optimizer, stepping)
        traffic.append(cost.sent | {"data": sum(t.sent for t in exchange)})
    fixed = efficiency.iteration_ms * 1e-3
    seconds = timeline.seconds + data + optimizer + fixed
    others = fleet.estimates(config, scored, seconds, efficiency) if fleet else []
    kinds = rank_kinds(config, world, shares, batches, efficiency)
    mean = {name: sum(c.parts[name] for c in costs) / len(costs) for name in costs[0].parts}
    return Estimate(
        world=world,
        num_microbatches=count,
        micro_batches=batches,
        kinds=kinds,
        flops=needed_flops(config, world, specs, batches),
        seconds=seconds,
        parts=mean
        | {
            "waiting": max(0.0, timeline.seconds - timeline.decoder_busy),
            "data": data,
            "optimizer": optimizer,
            "fixed": fixed,
        },
        bubble=max(0.0, 1 - timeline.decoder_busy / timeline.seconds),
        decoder_idle=1 - timeline.decoder_busy / seconds,
        score_idle=1 - score_busy / seconds if dedicated else None,
        traffic={name: max(sent[name] for sent in traffic) for name in traffic[0]},
        fits=all(
            kind.memory.total * (1 + efficiency.memory_error) <= gpu.memory_gib * GIB
            for kind in kinds
        )
        and all(one.fits for one in others),
        joined=others,
    )


def _timeline(
    config: RunConfig,
    world: RankGrid,
    costs: list[PipelineStageCost],
    scored: ScoreShare,
    rates: Rates,
) -> Timeline:
    forward, backward = [cost.forward for cost in costs], [cost.backward for cost in costs]
    if not world.score_ranks_per_unit:
        return play(forward, backward)
    servers = unit_servers(config, world, scored, rates)
    return play(
        forward,
        backward,
        [servers.seconds] * len(forward[0]),
        score_ranks=scored.groups,
        replicas=world.replicas_per_unit,
        ahead=config.score.window - 1,
        link=servers.link,
    )


def _exposed(seconds: float, cover: float) -> float:
    """The seconds of an exchange that do not overlap with a pass; its last bucket never does."""
    return max(0.05 * seconds, seconds - _HIDDEN_SHARE * cover)


def _optimizer_seconds(
    config: RunConfig, world: RankGrid, held: RankCount, gpu: Gpu, efficiency: Efficiency
) -> float:
    """Clearing and norming the gradients, then reading and writing the optimizer's share."""
    sharing = world.num_replicas if config.parallel.use_distributed_optimizer else 1
    settings = config.optimizer
    offloaded = settings.optimizer_offload_fraction if settings.optimizer_cpu_offload else 0.0
    moved = held.gradient_elements * (4 + 4 / sharing + 30 * (1 - offloaded) / sharing)
    by_host = held.gradient_elements * offloaded / sharing * _OFFLOADED_TRAFFIC
    return moved / (gpu.memory_gb_s * 1e9 * efficiency.bandwidth) + by_host / _HOST_SPEED
