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
from megatron_kosmosg.planning.stage_work import Work, needed_flops, score_work, stage_work
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
    rates = _Rates(gpu.peak_flops(config.training.precision), efficiency)
    dedicated = world.score_ranks_per_unit > 0
    score_rows = _score_rows(config, world, count)
    forward, backward, parts, traffic = [], [], [], []
    for stage, piece in enumerate(pieces):
        is_last = stage == world.pp_size - 1
        tensor_wire = comm.group_gb_s(world.tensor_group(0, stage), gpu)
        stage_wire = comm.group_gb_s(world.pipeline_group(0, 0), gpu)
        ahead, back = [], []
        spent = dict.fromkeys(("forward", "backward", "score", "tensor", "pipeline"), 0.0)
        sent = dict.fromkeys(("tensor", "pipeline", "score_link"), 0.0)
        for batch in batches:
            work = stage_work(config, piece, is_last, batch)
            scored = []
            if is_last and config.stage == "instruct" and not dedicated:
                scored = score_work(config, -(-batch.images // world.tp_size))
            tensor = comm.tensor_traffic(config, piece, is_last, batch)
            handed = comm.boundary_traffic(config, world, batch)
            times = {
                "forward": sum(rates.seconds(w, w.forward) for w in work),
                "backward": sum(rates.seconds(w, w.backward) for w in work),
                "score": sum(rates.seconds(w, w.forward + w.backward) for w in scored),
                "tensor": sum(t.seconds(tensor_wire, efficiency) for t in tensor),
                "pipeline": 2 * handed.seconds(stage_wire, efficiency),
            }
            for name, seconds in times.items():
                spent[name] += seconds
            sent["tensor"] += sum(t.sent for t in tensor)
            sent["pipeline"] += 2 * handed.sent if 0 < stage < world.pp_size - 1 else handed.sent
            if dedicated and is_last:
                sent["score_link"] += comm.score_link_traffic(config, batch.images).sent / 2
            once = times["pipeline"] / 2
            score_ahead = sum(rates.seconds(w, w.forward) for w in scored)
            ahead.append(
                times["forward"] + tensor[0].seconds(tensor_wire, efficiency) + once + score_ahead
            )
            back.append(
                times["backward"]
                + tensor[1].seconds(tensor_wire, efficiency)
                + once
                + times["score"]
                - score_ahead
            )
        forward.append(ahead)
        backward.append(back)
        parts.append(spent)
        traffic.append(sent)
    link = comm.score_link_traffic(config, config.training.micro_batch_size)
    on_the_way = link.seconds(comm.group_gb_s(list(range(world.unit_size)), gpu), efficiency)
    timeline = _timeline(config, world, forward, backward, score_rows, rates, on_the_way)
    data, optimizer = 0.0, 0.0
    for stage, held in enumerate(counts):
        exchange = comm.data_traffic(config, world, held)
        wire = comm.data_gb_s(world, gpu, stage)
        gradients, parameters = (t.seconds(wire, efficiency) for t in exchange)
        if config.parallel.overlap_grad_reduce:
            gradients = _exposed(gradients, backward[stage][-1])
        if config.parallel.overlap_param_gather:
            parameters = _exposed(parameters, forward[stage][0])
        data = max(data, gradients + parameters)
        optimizer = max(optimizer, _optimizer_seconds(config, world, held, gpu, efficiency))
        traffic[stage]["data"] = sum(t.sent for t in exchange)
    fixed = efficiency.iteration_ms * 1e-3
    seconds = timeline.seconds + data + optimizer + fixed
    kinds = _kinds(config, world, pieces, counts, batches, score_rows, efficiency)
    mean = {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}
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
        score_idle=1 - timeline.score_busy / seconds if dedicated else None,
        traffic={name: max(sent[name] for sent in traffic) for name in traffic[0]},
        fits=all(kind.memory.total <= gpu.memory_gib * GIB for kind in kinds),
    )


@dataclass(frozen=True)
class _Rates:
    peak: float
    efficiency: Efficiency

    def seconds(self, work: Work, flops: float) -> float:
        reached = {
            "decoder": self.efficiency.decoder,
            "aligner": self.efficiency.aligner,
            "vision": self.efficiency.vision,
            "unet": self.efficiency.unet,
            "vae": self.efficiency.vae,
        }[work.kind]
        in_positions = work.kind in ("decoder", "aligner")
        half = self.efficiency.half_tokens if in_positions else self.efficiency.half_images
        return flops / (self.peak * reached * work.batch / (work.batch + half)) if flops else 0.0


def _score_rows(config: RunConfig, world: WorldLayout, count: int) -> tuple[int, int]:
    """(images a score rank takes at once, score ranks that work on different micro-batches)."""
    images, ranks = config.training.micro_batch_size, world.score_ranks_per_unit
    if not ranks or count * world.replicas_per_unit >= ranks:
        return images, max(ranks, 1)
    return -(-images // (ranks // count)), count  # fewer micro-batches than ranks: rows are split


def _timeline(
    config: RunConfig,
    world: WorldLayout,
    forward: list[list[float]],
    backward: list[list[float]],
    score_rows: tuple[int, int],
    rates: _Rates,
    on_the_way: float,
) -> Timeline:
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
