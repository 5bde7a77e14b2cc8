"""A plan: the estimate of a layout and its built shards, as JSON and as text.

docs/scaling.md explains every key of the JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.planning.comparison import Faster
from megatron_kosmosg.planning.estimate import Estimate
from megatron_kosmosg.planning.gpus import Efficiency, Gpu
from megatron_kosmosg.planning.memory import GIB
from megatron_kosmosg.planning.memory_table import memory_table
from megatron_kosmosg.planning.rank_map import rank_table
from megatron_kosmosg.planning.shards import BuiltShard
from megatron_kosmosg.planning.workload import mixture


@dataclass(frozen=True)
class Plan:
    config: RunConfig
    gpu: Gpu
    efficiency: Efficiency
    estimate: Estimate
    shards: list[BuiltShard]
    notes: list[str]
    faster: list[Faster]
    """Layouts to think about instead of this one."""


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
            "placement": config.score.placement if config.stage == "instruct" else None,
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
                | {"total": kind.memory.total / GIB, "of": plan.gpu.memory_gib},
            }
            for kind in planned.kinds
        },
        "fits": planned.fits,
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
        "schedule": {
            "iterations": iterations,
            "samples": images * iterations,
            "days": seconds * iterations / 86400,
            "gpu_hours": seconds * iterations / 3600 * world.world_size,
        },
    }


def to_text(plan: Plan) -> str:
    """The same for people."""
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
        f"{schedule['iterations']:,} updates: {schedule['days']:.2f} days, "
        f"{schedule['gpu_hours']:,.0f} GPU-hours",
        "",
        "assumed: " + ", ".join(f"{k} {v:g}" for k, v in asdict(plan.efficiency).items()),
    ]
    return "\n".join(lines)


def _memory_lines(plan: Plan, facts: dict) -> list[str]:
    lines = [memory_table(plan.estimate.kinds, plan.gpu.memory_gib)]
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
