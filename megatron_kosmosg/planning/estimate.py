"""What one update of a layout costs: seconds, FLOPs, bytes sent, memory; by formulae alone."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.world import WorldLayout
from megatron_kosmosg.planning import communication as comm
from megatron_kosmosg.planning.gpus import Efficiency, Gpu
from megatron_kosmosg.planning.memory import GIB, RankMemory, decoder_memory, score_memory
from megatron_kosmosg.planning.model_counts import ModelShares, RankCount
from megatron_kosmosg.planning.stage_cost import Rates, StageCost, stage_cost
from megatron_kosmosg.planning.stage_work import needed_flops, score_work
from megatron_kosmosg.planning.timeline import Timeline, play
from megatron_kosmosg.planning.workload import MicroBatch, micro_batches

_HIDDEN_SHARE = 0.8
"""Share of a pass behind which gradient exchange or parameter gathering hides."""


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
class Estimate:
    """One update."""

    world: WorldLayout
    num_microbatches: int
    micro_batches: list[MicroBatch]
    kinds: list[RankKind]
    flops: dict[str, float]
    """By module, over all ranks, without recomputation and without repeats on tensor ranks."""
    seconds: float
    parts: dict[str, float]
    """Seconds of a decoder rank: forward, backward, score, tensor, pipeline, waiting, data,
    optimizer, fixed. They add up to `seconds`."""
    bubble: float
    """Share of the schedule that decoder ranks wait, for each other or for score ranks."""
    decoder_idle: float
    """Share of the update that decoder ranks neither compute nor exchange tensor shards."""
    score_idle: float | None
    """The same of dedicated score ranks; None without any."""
    traffic: dict[str, float]
    """Bytes sent by a rank per update, by group; the largest over the kinds of rank."""
    fits: bool

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


def estimate(
    config: RunConfig, world: WorldLayout, gpu: Gpu, efficiency: Efficiency, shares: ModelShares
) -> Estimate:
    """The update of `config` on `world`. shares: `model_counts.model_shares` of `config`.

    Raises ConfigError for a batch that does not divide, or a precision that the GPU lacks.
    """
    count = num_microbatches(config, world.num_replicas)
    batches = micro_batches(config, count)
    pieces, counts = shares.pieces, shares.counts
    rates = Rates(gpu.peak_flops(config.training.precision), efficiency)
    dedicated = world.score_ranks_per_unit > 0
    score_rows = _score_rows(config, world, count)
    costs = [
        stage_cost(config, world, stage, piece, batches, gpu, rates)
        for stage, piece in enumerate(pieces)
    ]
    link = comm.score_link_traffic(config, config.training.micro_batch_size)
    on_the_way = link.seconds(comm.group_gb_s(list(range(world.unit_size)), gpu), efficiency)
    timeline = _timeline(config, world, costs, score_rows, rates, on_the_way)
    data, optimizer, traffic = 0.0, 0.0, []
    for stage, (held, cost) in enumerate(zip(counts, costs, strict=True)):
        exchange = comm.data_traffic(config, world, held)
        wire = comm.data_gb_s(world, gpu, stage)
        gradients, parameters = (t.seconds(wire, efficiency) for t in exchange)
        if config.parallel.overlap_grad_reduce:
            gradients = _exposed(gradients, cost.backward[-1])
        if config.parallel.overlap_param_gather:
            parameters = _exposed(parameters, cost.forward[0])
        data = max(data, gradients + parameters)
        optimizer = max(optimizer, _optimizer_seconds(config, world, held, gpu, efficiency))
        traffic.append(cost.sent | {"data": sum(t.sent for t in exchange)})
    fixed = efficiency.iteration_ms * 1e-3
    seconds = timeline.seconds + data + optimizer + fixed
    kinds = _kinds(config, world, pieces, counts, batches, score_rows, efficiency)
    mean = {name: sum(c.parts[name] for c in costs) / len(costs) for name in costs[0].parts}
    return Estimate(
        world=world,
        num_microbatches=count,
        micro_batches=batches,
        kinds=kinds,
        flops=needed_flops(config, world, pieces, batches),
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
        score_idle=1 - timeline.score_busy * _used(world, score_rows) / seconds
        if dedicated
        else None,
        traffic={name: max(sent[name] for sent in traffic) for name in traffic[0]},
        fits=all(kind.memory.total <= gpu.memory_gib * GIB for kind in kinds),
    )


def _score_rows(config: RunConfig, world: WorldLayout, count: int) -> tuple[int, int]:
    """(images a score rank takes at once, score ranks that work on different micro-batches)."""
    images, ranks = config.training.micro_batch_size, world.score_ranks_per_unit
    if not ranks or count * world.replicas_per_unit >= ranks:
        return images, max(ranks, 1)
    return -(-images // (ranks // count)), count  # fewer micro-batches than ranks: rows are split


def _used(world: WorldLayout, score_rows: tuple[int, int]) -> float:
    """Share of a unit's score ranks that get work at all."""
    groups, ranks = score_rows[1], world.score_ranks_per_unit
    return groups * (ranks // groups) / ranks


def _timeline(
    config: RunConfig,
    world: WorldLayout,
    costs: list[StageCost],
    score_rows: tuple[int, int],
    rates: Rates,
    on_the_way: float,
) -> Timeline:
    forward, backward = [cost.forward for cost in costs], [cost.backward for cost in costs]
    if not world.score_ranks_per_unit:
        return play(forward, backward)
    rows, groups = score_rows
    once = sum(rates.seconds(w, w.forward + w.backward) for w in score_work(config, rows))
    return play(
        forward,
        backward,
        [once + on_the_way] * len(forward[0]),
        score_ranks=groups,
        replicas=world.replicas_per_unit,
        ahead=config.score.window - 1,
    )


def _exposed(seconds: float, cover: float) -> float:
    """What is left of an exchange that overlaps with a pass; its last bucket never does."""
    return max(0.05 * seconds, seconds - _HIDDEN_SHARE * cover)


def _optimizer_seconds(
    config: RunConfig, world: WorldLayout, held: RankCount, gpu: Gpu, efficiency: Efficiency
) -> float:
    """Clearing and norming the gradients, then reading and writing the optimizer's share."""
    sharing = world.num_replicas if config.parallel.use_distributed_optimizer else 1
    moved = held.gradient_elements * (4 + 4 / sharing + 30 / sharing)
    return moved / (gpu.memory_gb_s * 1e9 * efficiency.bandwidth)


def _kinds(
    config: RunConfig,
    world: WorldLayout,
    pieces: list,
    counts: list[RankCount],
    batches: list[MicroBatch],
    score_rows: tuple[int, int],
    efficiency: Efficiency,
) -> list[RankKind]:
    kinds = [
        RankKind(
            name=f"decoder_stage_{stage}" if world.pp_size > 1 else "decoder",
            holds=held.pieces,
            count=world.num_replicas * world.tp_size,
            parameters=held,
            memory=decoder_memory(config, world, piece, stage, held, batches, efficiency),
        )
        for stage, (piece, held) in enumerate(zip(pieces, counts, strict=True))
    ]
    if world.score_ranks_per_unit:
        memory = score_memory(config, score_rows[0], efficiency)
        kinds.append(RankKind("score", "U-Net and VAE", world.num_score_ranks, None, memory))
    return kinds
