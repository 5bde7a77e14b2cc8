"""FLOPs, seconds and bytes of a rank of one pipeline stage: module by module, then pass by pass.

Sizes and formulae are those of `models/flops.py`, the U-Net's counts those of
`models/diffusion_flops.py`. What a tensor-parallel rank does not share with others (image tower,
text encoder, input projections) it does whole. Recomputed forward passes count as backward work.
Long because the work of a pass, its exchanges and their sums have no other reader.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_kosmosg.config.rank_grid import RankGrid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models import flops
from megatron_kosmosg.models.diffusion_flops import diffusion_flops
from megatron_kosmosg.models.pipeline_stage_specs import PipelineStageSpec
from megatron_kosmosg.planning import communication as comm
from megatron_kosmosg.planning.gpus import Gpu
from megatron_kosmosg.planning.launches import launches, score_launches
from megatron_kosmosg.planning.rates import ModuleWork, Rates
from megatron_kosmosg.planning.workload import MicroBatch
from megatron_kosmosg.stages import stage_facts


def pipeline_stage_work(
    config: RunConfig, spec: PipelineStageSpec, is_last: bool, batch: MicroBatch
) -> list[ModuleWork]:
    """The modules on a rank of one pipeline stage, the frozen U-Net left out."""
    tp = config.parallel.tensor_model_parallel_size
    rows, positions = batch.rows, batch.positions
    is_first = spec.first_decoder_layer == 0
    facts = stage_facts(config.stage)
    again = 1 if config.training.recompute == "full" else 0
    done: list[ModuleWork] = []
    if is_first and batch.prompt_images:
        seen = flops.vision_flops(config, batch.prompt_images)
        trained = flops.trained_vision_flops(config, batch.prompt_images)
        trained *= flops.updates(config, "vision_encoder") - 1
        done.append(ModuleWork("vision", "vision", seen, trained, batch.prompt_images))
        resampled = flops.resampler_flops(config, batch.prompt_images) / tp
        queries = batch.prompt_images * config.model.resampler.num_latent_queries / tp
        back = resampled * (flops.updates(config, "resampler") - 1)
        done.append(ModuleWork("resampler", "aligner", resampled, back, queries))
    if spec.num_decoder_layers:
        share = spec.num_decoder_layers / config.model.decoder.num_layers
        forward = flops.decoder_flops(config, positions, rows) * share / tp
        added = flops.adapter_flops(config, positions) * share / tp
        back = forward * (flops.updates(config, "decoder") - 1) + 2 * added
        backward = back + again * (forward + added) if facts.trains_decoder else 0.0
        done.append(ModuleWork("decoder", "decoder", forward + added, backward, positions / tp))
    for part in spec.aligner_parts:
        formula = flops.aligner_m_flops if part == "M" else flops.aligner_n_flops
        forward = formula(config, positions, rows) / tp
        back = flops.updates(config, "aligner_m") - 1 if part == "M" else 2
        done.append(
            ModuleWork(
                f"aligner_{part}", "aligner", forward, forward * (back + again), positions / tp
            )
        )
    if is_last and facts.has_output_head:
        forward = flops.head_flops(config, positions) / tp
        done.append(ModuleWork("head", "decoder", forward, 2 * forward, positions / tp))
    if is_last and facts.has_text_encoder:
        forward = flops.clip_text_flops(config, batch.images)
        done.append(ModuleWork("clip_text", "aligner", forward, 0.0, batch.images * 77.0))
    return done


def score_work(config: RunConfig, images: float) -> list[ModuleWork]:
    """The frozen U-Net, and the VAE's encoder unless its moments are cached, on `images` images."""
    counted = diffusion_flops(
        config.model.diffusion.path,
        config.data.target_image_size,
        config.model.aligner.num_queries,
    )
    again = counted.forward if config.score.recompute else 0
    done = [
        ModuleWork(
            "unet", "unet", images * counted.forward, images * (counted.backward + again), images
        )
    ]
    if config.data.latent_cache is None:
        done.append(ModuleWork("vae", "vae", images * counted.encode, 0.0, images))
    return done


def score_seconds(config: RunConfig, images: float, rates: Rates) -> float:
    """How long a dedicated score rank takes for a request of `images` images."""
    work = score_work(config, images)
    computing = sum(rates.seconds(w, w.forward + w.backward) for w in work)
    return max(computing, rates.launching(sum(score_launches(config))))


def needed_flops(
    config: RunConfig, world: RankGrid, specs: list[PipelineStageSpec], batches: list[MicroBatch]
) -> dict[str, float]:
    """FLOPs of one update by module, over all replicas; each rank's repeats and recomputation left
    out, padding and the null condition's row included."""
    total: dict[str, float] = {}
    once_more = config.training.recompute == "full"
    for batch, times in Counter(batches).items():
        done = [
            (work, 1 if work.module in _WHOLE else world.tp_size, once_more * _recomputed(work))
            for pipeline_stage, spec in enumerate(specs)
            for work in pipeline_stage_work(
                config, spec, pipeline_stage == world.pp_size - 1, batch
            )
        ]
        if stage_facts(config.stage).has_unet:
            again = config.score.recompute
            done += [
                (work, 1, again * work.forward * (work.module == "unet"))
                for work in score_work(config, batch.images)
            ]
        for work, ranks, redone in done:
            needed = (work.forward + work.backward - redone) * ranks * world.num_replicas * times
            total[work.module] = total.get(work.module, 0.0) + needed
    return total


_WHOLE = ("vision", "clip_text")
"""Modules that every tensor-parallel rank computes whole."""


def _recomputed(work: ModuleWork) -> float:
    """The forward pass that full recomputation repeats."""
    stacks = ("decoder", "aligner_M", "aligner_N")
    return work.forward if work.module in stacks and work.backward else 0.0


@dataclass(frozen=True)
class PipelineStageCost:
    """What one update costs a rank of a pipeline stage."""

    forward: list[float]
    """Seconds of every micro-batch, exchange with the neighbours included."""
    backward: list[float]
    parts: dict[str, float]
    """Their sum by cause: forward, backward, score, tensor, pipeline, launches (what the GPU waits
    for the host besides)."""
    sent: dict[str, float]
    """Bytes by group: tensor, pipeline, score_link (both ways)."""
    first_forward: float
    """Arithmetic of the first micro-batch's trained modules, behind which their parameters are
    gathered; a colocated U-Net comes after them."""
    last_backward: float
    """The same of the last one, behind which gradients are exchanged; the U-Net comes before."""


def pipeline_stage_cost(
    config: RunConfig,
    world: RankGrid,
    pipeline_stage: int,
    spec: PipelineStageSpec,
    batches: list[MicroBatch],
    gpu: Gpu,
    rates: Rates,
) -> PipelineStageCost:
    """The cost of pipeline stage `pipeline_stage`; the U-Net is part of it only where it is
    colocated."""
    is_last = pipeline_stage == world.pp_size - 1
    neighbours = (pipeline_stage > 0) + (not is_last)
    has_unet = stage_facts(config.stage).has_unet
    scores_itself = is_last and has_unet and not world.score_ranks_per_unit
    tensor_wire = comm.group_gb_s(world.tensor_group(0, pipeline_stage), gpu)
    pipeline_wire = comm.group_gb_s(world.pipeline_group(0, 0), gpu)
    forward, backward = [], []
    names = ("forward", "backward", "score", "tensor", "pipeline", "launches")
    parts: dict[str, float] = dict.fromkeys(names, 0.0)
    sent: dict[str, float] = dict.fromkeys(("tensor", "pipeline", "score_link"), 0.0)
    first_forward = last_backward = 0.0
    known: dict[MicroBatch, _PassCost] = {}  # an update has few micro-batches that differ
    for index, batch in enumerate(batches):
        if batch not in known:
            known[batch] = _pass_cost(
                config,
                world,
                spec,
                is_last,
                scores_itself,
                batch,
                tensor_wire,
                pipeline_wire,
                rates,
            )
        cost = known[batch]
        computed = (
            cost.ahead + cost.score_ahead + cost.tensor[0],
            cost.back + cost.score_back + cost.tensor[1],
        )
        idle = [max(0.0, h - c) for h, c in zip(cost.launching, computed, strict=True)]
        forward.append(computed[0] + idle[0] + cost.boundary)
        backward.append(computed[1] + idle[1] + cost.boundary)
        first_forward, last_backward = (first_forward if index else cost.ahead), cost.back
        parts["forward"] += cost.ahead
        parts["backward"] += cost.back
        parts["score"] += cost.score_ahead + cost.score_back
        parts["tensor"] += sum(cost.tensor)
        parts["pipeline"] += 2 * cost.boundary
        parts["launches"] += sum(idle)
        sent["tensor"] += cost.tensor_sent
        sent["pipeline"] += neighbours * cost.boundary_sent
        if is_last and world.score_ranks_per_unit:
            sent["score_link"] += comm.score_link_traffic(config, batch.images).sent
    return PipelineStageCost(forward, backward, parts, sent, first_forward, last_backward)


@dataclass(frozen=True)
class _PassCost:
    """One micro-batch: seconds forward and back, of the U-Net too where it is here, of the host
    that launches either pass, of both exchanges between tensor ranks and of one between pipeline
    stages; bytes sent."""

    ahead: float
    back: float
    score_ahead: float
    score_back: float
    launching: tuple[float, float]
    tensor: list[float]
    boundary: float
    tensor_sent: float
    boundary_sent: float


def _pass_cost(
    config: RunConfig,
    world: RankGrid,
    spec: PipelineStageSpec,
    is_last: bool,
    scores_itself: bool,
    batch: MicroBatch,
    tensor_wire: float,
    pipeline_wire: float,
    rates: Rates,
) -> _PassCost:
    work = pipeline_stage_work(config, spec, is_last, batch)
    scored = score_work(config, -(-batch.images // world.tp_size)) if scores_itself else []
    ahead, back = launches(config, spec, is_last, batch.prompt_images)
    if scores_itself:
        more = score_launches(config)
        ahead, back = ahead + more.forward, back + more.backward
    exchanged = comm.tensor_traffic(config, spec, is_last, batch)
    handed = comm.boundary_traffic(config, world, batch)
    return _PassCost(
        ahead=sum(rates.seconds(w, w.forward) for w in work),
        back=sum(rates.seconds(w, w.backward) for w in work),
        score_ahead=sum(rates.seconds(w, w.forward) for w in scored),
        score_back=sum(rates.seconds(w, w.backward) for w in scored),
        launching=(rates.launching(ahead), rates.launching(back)),
        tensor=[t.seconds(tensor_wire, rates.efficiency, world.tp_size) for t in exchanged],
        boundary=handed.seconds(pipeline_wire, rates.efficiency),
        tensor_sent=sum(traffic.sent for traffic in exchanged),
        boundary_sent=handed.sent,
    )
