"""From a config and a number of GPUs to a plan, of the layout in the config or of the best one; the
plan as JSON and as text.

docs/scaling.md explains every key of the JSON. Long because the keys, their words and the choice of
what is planned have no other reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.planning.comparison import Faster, as_dict, faster_layouts, in_words, reasons
from megatron_kosmosg.planning.estimate import Estimate, estimate
from megatron_kosmosg.planning.fleet_plan import FleetPlan, check_joined, fleet_plan
from megatron_kosmosg.planning.gpus import Efficiency, Gpu
from megatron_kosmosg.planning.host_memory import HostPlan, plan_host
from megatron_kosmosg.planning.joined import JoinedRanks
from megatron_kosmosg.planning.memory import GIB, memory_table
from megatron_kosmosg.planning.model_counts import (
    BuiltShard,
    ModelShares,
    build_shards,
    model_shares,
    trained_and_frozen,
    whole_model,
)
from megatron_kosmosg.planning.other_batches import (
    faster_batches,
    more_gpus,
    nearest_batches,
    other_batches,
)
from megatron_kosmosg.planning.pipeline_balance import with_default_layout
from megatron_kosmosg.planning.rank_map import rank_table
from megatron_kosmosg.planning.search import NothingFits, SearchResult, search
from megatron_kosmosg.planning.workload import assumed_kinds, mixture, with_kinds
from megatron_kosmosg.stages import stage_facts

IDLE_GOAL = 0.05
_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Plan:
    config: RunConfig
    gpu: Gpu
    efficiency: Efficiency
    estimate: Estimate
    host: HostPlan
    shards: list[BuiltShard]
    notes: list[str]
    faster: list[Faster]
    """Layouts to think about instead of this one."""
    fleet: FleetPlan | None
    """Score ranks of other jobs that join; None without any."""


def planned_config(config: RunConfig, world_size: int, gpu: Gpu) -> tuple[RunConfig, list[str]]:
    """The config made for `world_size` GPUs of that sort, with the kinds of its datasets; and notes
    on what was changed for it or assumed. Raises as `with_kinds` does."""
    config = with_kinds(config)
    notes = assumed_kinds(config)
    if config.training.precision == "bf16" and not gpu.bf16_tflops:
        config = replace(config, training=replace(config.training, precision="fp16"))
        notes.append(f"{gpu.name} has no bf16 arithmetic: training.precision=fp16 is planned")
    return replace(config, parallel=replace(config.parallel, world_size=world_size)), notes


def make_plan(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    efficiency: Efficiency,
    notes: list[str],
    joined: Sequence[JoinedRanks] = (),
) -> Plan:
    """Plans the layout in `config`, and names those that would be faster.

    Args:
        world_size: number of GPUs, those of score ranks included.
        gpu: the kind of GPU.
        efficiency: how much of the GPU's stated speed is reached.
        notes: what was assumed so far, which the plan then says.
        joined: score ranks of other jobs, which `world_size` does not count.

    Raises:
        ConfigError: the layout is not valid, or those that `joined` cannot join it.
    """
    try:
        validate_layout(config, world_size, stage_facts(config.stage))
    except ConfigError as error:
        raise ConfigError(
            f"{error}; or add --search, which tries every layout of {world_size} GPUs"
        ) from None
    check_joined(config, joined, searches=False)
    config = with_default_layout(config)
    model = whole_model(config)
    plan = plan_layout(config, world_size, gpu, efficiency, notes, model, joined)
    others = other_batches(config, world_size, gpu, efficiency, model, joined)
    faster = faster_batches(config, plan.estimate, others)
    try:
        found = search(config, world_size, gpu, efficiency, model, joined).candidates
    except NothingFits as nothing:
        return replace(plan, notes=[*plan.notes, str(nothing)], faster=faster)
    return replace(plan, faster=[*faster_layouts(config, plan.estimate, found), *faster])


def plan_layout(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    efficiency: Efficiency,
    notes: list[str],
    model: torch.nn.Module,
    joined: Sequence[JoinedRanks] = (),
) -> Plan:
    """The plan of the layout in `config` alone. model: `whole_model(config)`.

    Raises ConfigError for interleaved pipeline stages.
    """
    if config.parallel.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError(
            "times of interleaved pipeline stages are not planned; add "
            "parallel.virtual_pipeline_model_parallel_size=null (train --dry-run shows who does "
            "what with them)"
        )
    world = rank_grid(config, world_size)
    shares = model_shares(config, model)
    planned = estimate(config, world, gpu, efficiency, shares, joined)
    if stage_facts(config.stage).has_unet:
        notes = [*notes, _idle_note(config, world_size, gpu, efficiency, shares, joined)]
    fleet = fleet_plan(config, gpu, efficiency, shares, planned) if planned.joined else None
    parameters = trained_and_frozen(model)
    host = plan_host(config, world, shares, planned.micro_batches, parameters, gpu.per_node)
    shards = build_shards(config, world)
    return Plan(config, gpu, efficiency, planned, host, shards, notes, faster=[], fleet=fleet)


def search_plan(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    efficiency: Efficiency,
    notes: list[str],
    top: int,
    joined: Sequence[JoinedRanks] = (),
    *,
    may_cache_latents: bool = True,
) -> tuple[Plan, str, dict]:
    """The plan of the fastest layout, the list of the `top` fastest as text, both for the JSON.

    Args:
        joined: score ranks of other jobs; layouts that they cannot join are then left out.
        may_cache_latents: whether the plan may ask for latents that `config` does not have.

    Raises ConfigError, with the nearest batches and their speeds, where no layout is left.
    """
    check_joined(config, joined, searches=True)
    model = whole_model(config)
    others = other_batches(config, world_size, gpu, efficiency, model, joined)
    try:
        result = every = search(config, world_size, gpu, efficiency, model, joined)
        if joined:
            result = _with_score_ranks(result)
        if not may_cache_latents:
            result = _without_new_latents(config, result)
    except NothingFits as nothing:
        advice = nearest_batches(others) or more_gpus(config, world_size, gpu, efficiency, model)
        raise ConfigError(f"{nothing}; {advice}") from None
    best = result.candidates[0]
    plan = plan_layout(best.config, world_size, gpu, efficiency, notes, model, joined)
    instead = faster_layouts(best.config, plan.estimate, every.candidates) if joined else []
    faster = faster_batches(best.config, plan.estimate, others)
    plan = replace(plan, faster=[*instead, *faster])
    settings, why = best.choice.overrides(stage_facts(config.stage)), reasons(result)
    lines = [f"{len(result.candidates)} of {result.num_tried} layouts fit; the fastest:"]
    lines += [
        f"  {candidate.samples_per_second:8.0f} samples/s  {in_words(candidate)}"
        for candidate in result.candidates[:top]
    ]
    lines += ["", "why the first wins:", *(f"  {reason}" for reason in why)]
    lines += ["", "its settings: " + " ".join(settings)]
    facts = {
        "tried": result.num_tried,
        "too_large": result.num_too_large,
        "reasons": why,
        "settings": settings,
        "candidates": [as_dict(candidate) for candidate in result.candidates[:top]],
    }
    return plan, "\n".join(lines), facts


def _with_score_ranks(result: SearchResult) -> SearchResult:
    """The candidates that others can join."""
    kept = [c for c in result.candidates if c.estimate.world.score_ranks_per_unit]
    if not kept:
        raise NothingFits(
            "no layout with score.placement=dedicated fits, and only such can be joined"
        )
    return replace(result, candidates=kept)


def _without_new_latents(config: RunConfig, result: SearchResult) -> SearchResult:
    """The candidates that read what `config` reads."""
    cached = config.data.latent_cache is not None
    kept = [c for c in result.candidates if c.choice.cached_latents == cached]
    if not kept:
        raise NothingFits(
            f"no layout of stage={config.stage} that reads images fits; write latents with "
            "`kosmosg cache-latents` and set data.latent_cache"
        )
    return replace(result, candidates=kept)


def _idle_note(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    efficiency: Efficiency,
    shares: ModelShares,
    joined: Sequence[JoinedRanks],
) -> str:
    """The smallest multiple of the batch at which decoder ranks idle less than the goal."""
    training = config.training
    for times in _BATCHES:
        larger = replace(training, global_batch_size=times * training.global_batch_size)
        planned = estimate(
            replace(config, training=larger),
            rank_grid(config, world_size), gpu, efficiency, shares, joined,
        )  # fmt: skip
        if planned.decoder_idle < IDLE_GOAL:
            return (
                f"decoder ranks idle less than {IDLE_GOAL:.0%} from {larger.global_batch_size:,} "
                f"images an update on ({larger.global_batch_size / planned.seconds:.0f} images/s)"
            )
    return (
        f"decoder ranks idle {planned.decoder_idle:.0%} even at {larger.global_batch_size:,} "
        "images an update"
    )


def written_config(config: RunConfig, plan: Plan, gpu: str) -> RunConfig:
    """The config as the user gave it, with what the plan settled and which GPU it was made for."""
    planned = plan.config
    return replace(
        config,
        parallel=planned.parallel,
        score=planned.score,
        training=planned.training,
        data=replace(config.data, latent_cache=planned.data.latent_cache),
        logging=replace(config.logging, planned_gpu=gpu),
    )


def to_json(plan: Plan) -> dict:
    """Plain numbers, strings, lists and dicts."""
    config, planned, world = plan.config, plan.estimate, plan.estimate.world
    images, iterations = config.training.global_batch_size, config.training.train_iters
    seconds = planned.seconds
    built = {shard.kind: shard for shard in plan.shards}
    return {
        "stage": config.stage,
        "gpu": plan.gpu.name,
        "num_gpus": world.world_size,
        "precision": config.training.precision,
        "notes": plan.notes,
        "faster": [asdict(layout) for layout in plan.faster],
        "assumptions": asdict(plan.efficiency) | {"gpu": asdict(plan.gpu)},
        "samples": [asdict(entry) for entry in mixture(config)],
        "layout": {
            "tensor": world.tp_size,
            "pipeline": world.pp_size,
            "data": world.num_replicas,
            "placement": config.score.placement if stage_facts(config.stage).has_unet else None,
            "score_ranks_per_unit": world.score_ranks_per_unit,
            "replicas_per_unit": world.replicas_per_unit,
            "window": config.score.window if world.score_ranks_per_unit else None,
            "micro_batch_size": config.training.micro_batch_size,
            "num_micro_batches": planned.num_microbatches,
            "recompute": config.training.recompute,
            "score_recompute": config.score.recompute,
            "latent_cache": config.data.latent_cache,
            "pipeline_layout": config.parallel.pipeline_layout,
        },
        "rank_map": rank_table(world).splitlines(),
        "ranks": {
            kind.name: {
                "count": kind.count,
                "holds": kind.holds,
                "first_rank": built[kind.name].rank,
                "groups": built[kind.name].groups,
                "trainable_parameters": built[kind.name].trainable,
                "frozen_parameters": built[kind.name].frozen,
                "parameter_bytes": built[kind.name].parameter_bytes,
                "memory_gib": {name: value / GIB for name, value in asdict(kind.memory).items()}
                | {
                    "overhead": kind.memory.overhead / GIB,
                    "total": kind.memory.total / GIB,
                    "of": plan.gpu.memory_gib,
                },
            }
            for kind in planned.kinds
        },
        "fits": planned.fits,
        **plan.host.as_dict(),
        "flops": {
            "per_sample": {name: value / images for name, value in planned.flops.items()},
            "per_iteration": planned.flops,
            "total_per_iteration": planned.total_flops,
        },
        "bytes_sent_per_iteration": planned.traffic,
        "iteration": {
            "seconds": seconds,
            "parts_seconds": planned.parts,
            "images_per_second": images / seconds,
            "tflops_per_gpu": planned.total_flops / seconds / world.world_size / 1e12,
            "bubble": planned.bubble,
            "decoder_idle": planned.decoder_idle,
            "score_idle": planned.score_idle,
        },
        "score_fleet": plan.fleet.as_dict() if plan.fleet else None,
        "schedule": {
            "iterations": iterations,
            "samples": images * iterations,
            "days": seconds * iterations / 86400,
            "gpu_hours": seconds * iterations / 3600 * world.world_size,
        },
    }


def to_text(plan: Plan) -> str:
    """The plan as text for people."""
    facts = to_json(plan)
    layout, iteration, schedule = facts["layout"], facts["iteration"], facts["schedule"]
    batch = f"{layout['micro_batch_size']} per micro-batch x {layout['num_micro_batches']}"
    lines = [
        f"{facts['stage']} on {facts['num_gpus']} x {facts['gpu']}, {facts['precision']}, "
        f"{plan.config.training.global_batch_size} samples an update ({batch} x "
        f"{layout['data']} replicas), recompute {layout['recompute']}",
        *(f"note: {note}" for note in facts["notes"]),
        *(
            f"note: {layout.times:.1f} x this speed ({layout.samples_per_second:,.0f} samples/s) "
            f"is planned for {layout.layout}; settings: {' '.join(layout.settings)}"
            for layout in plan.faster
        ),
        "",
        *facts["rank_map"],
        "",
        *_memory_lines(plan, facts),
        *plan.host.lines(),
        "",
        *_flops_lines(facts),
        "",
        "sent by a rank per update: "
        + ", ".join(f"{k} {v / 1e9:.3g} GB" for k, v in facts["bytes_sent_per_iteration"].items()),
        "",
        f"update {iteration['seconds'] * 1e3:.0f} ms = "
        + " + ".join(f"{k} {v * 1e3:.0f}" for k, v in iteration["parts_seconds"].items() if v),
        f"{iteration['images_per_second']:.0f} samples/s, "
        f"{iteration['tflops_per_gpu']:.0f} TFLOP/s a GPU; idle: decoder ranks "
        f"{iteration['decoder_idle']:.1%}"
        + (f", score ranks {iteration['score_idle']:.1%}" if iteration["score_idle"] else "")
        + f"; bubble {iteration['bubble']:.1%}",
        *(plan.fleet.lines() if plan.fleet else []),
        f"{schedule['iterations']:,} updates: {schedule['days']:.2f} days, "
        f"{schedule['gpu_hours']:,.0f} GPU-hours",
        "",
        "assumed: " + ", ".join(f"{k} {v:g}" for k, v in asdict(plan.efficiency).items()),
        f"{plan.gpu.name}: {plan.gpu.source or 'figures of your own'}",
    ]
    return "\n".join(lines)


def _memory_lines(plan: Plan, facts: dict) -> list[str]:
    error = plan.efficiency.memory_error
    lines = [memory_table(plan.estimate.kinds, plan.gpu.memory_gib, error)]
    for name, kind in facts["ranks"].items():
        lines.append(
            f"{name}: {kind['trainable_parameters']:,} trained and {kind['frozen_parameters']:,} "
            f"frozen parameters built on rank {kind['first_rank']}; {kind['holds']}"
        )
    return lines


def _flops_lines(facts: dict) -> list[str]:
    flops = facts["flops"]
    lines = [f"{'module':<14}{'GFLOP a sample':>16}{'TFLOP an update':>18}"]
    for name, value in flops["per_iteration"].items():
        lines.append(f"{name:<14}{flops['per_sample'][name] / 1e9:>16,.1f}{value / 1e12:>18,.1f}")
    total = flops["total_per_iteration"] / 1e12
    lines.append(f"{'total':<14}{sum(flops['per_sample'].values()) / 1e9:>16,.1f}{total:>18,.1f}")
    return lines
