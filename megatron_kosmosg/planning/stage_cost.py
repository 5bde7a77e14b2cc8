"""Seconds and bytes sent of one update on a rank of one pipeline stage, pass by pass."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.world import WorldLayout
from megatron_kosmosg.models.pipeline_pieces import StagePieces
from megatron_kosmosg.planning import communication as comm
from megatron_kosmosg.planning.gpus import Efficiency, Gpu
from megatron_kosmosg.planning.stage_work import Work, score_work, stage_work
from megatron_kosmosg.planning.workload import MicroBatch


@dataclass(frozen=True)
class Rates:
    """How fast arithmetic goes."""

    peak: float
    """FLOP/s."""
    efficiency: Efficiency

    def seconds(self, work: Work, flops: float) -> float:
        """Of `flops` of some work, at the share of the peak that its batch reaches."""
        if not flops:
            return 0.0
        reached = {
            "decoder": self.efficiency.decoder,
            "aligner": self.efficiency.aligner,
            "vision": self.efficiency.vision,
            "unet": self.efficiency.unet,
            "vae": self.efficiency.vae,
        }[work.kind]
        in_positions = work.kind in ("decoder", "aligner")
        half = self.efficiency.half_tokens if in_positions else self.efficiency.half_images
        return flops / (self.peak * reached * work.batch / (work.batch + half))


@dataclass(frozen=True)
class StageCost:
    """One update."""

    forward: list[float]
    """Seconds of every micro-batch, exchange with the neighbours included."""
    backward: list[float]
    parts: dict[str, float]
    """Their sum by cause: forward, backward, score, tensor, pipeline."""
    sent: dict[str, float]
    """Bytes by group: tensor, pipeline, score_link (both ways)."""
    first_forward: float
    """Arithmetic of the first micro-batch's trained modules, behind which their parameters are
    gathered; a colocated U-Net comes after them."""
    last_backward: float
    """The same of the last one, behind which gradients are exchanged; the U-Net comes before."""


def stage_cost(
    config: RunConfig,
    world: WorldLayout,
    stage: int,
    piece: StagePieces,
    batches: list[MicroBatch],
    gpu: Gpu,
    rates: Rates,
) -> StageCost:
    """Of pipeline stage `stage`; the U-Net only where it is colocated."""
    is_last = stage == world.pp_size - 1
    neighbours = (stage > 0) + (not is_last)
    scores_itself = is_last and config.stage == "instruct" and not world.score_ranks_per_unit
    tensor_wire = comm.group_gb_s(world.tensor_group(0, stage), gpu)
    stage_wire = comm.group_gb_s(world.pipeline_group(0, 0), gpu)
    forward, backward = [], []
    parts = dict.fromkeys(("forward", "backward", "score", "tensor", "pipeline"), 0.0)
    sent = dict.fromkeys(("tensor", "pipeline", "score_link"), 0.0)
    first_forward = last_backward = 0.0
    for index, batch in enumerate(batches):
        work = stage_work(config, piece, is_last, batch)
        scored = score_work(config, -(-batch.images // world.tp_size)) if scores_itself else []
        exchanged = comm.tensor_traffic(config, piece, is_last, batch)
        handed = comm.boundary_traffic(config, world, batch)
        tensor = [traffic.seconds(tensor_wire, rates.efficiency) for traffic in exchanged]
        boundary = handed.seconds(stage_wire, rates.efficiency)
        ahead = sum(rates.seconds(w, w.forward) for w in work)
        back = sum(rates.seconds(w, w.backward) for w in work)
        score_ahead = sum(rates.seconds(w, w.forward) for w in scored)
        score_back = sum(rates.seconds(w, w.backward) for w in scored)
        forward.append(ahead + score_ahead + tensor[0] + boundary)
        backward.append(back + score_back + tensor[1] + boundary)
        first_forward, last_backward = (first_forward if index else ahead), back
        parts["forward"] += ahead
        parts["backward"] += back
        parts["score"] += score_ahead + score_back
        parts["tensor"] += sum(tensor)
        parts["pipeline"] += 2 * boundary
        sent["tensor"] += sum(traffic.sent for traffic in exchanged)
        sent["pipeline"] += neighbours * handed.sent
        if is_last and world.score_ranks_per_unit:
            sent["score_link"] += comm.score_link_traffic(config, batch.images).sent
    return StageCost(forward, backward, parts, sent, first_forward, last_backward)
