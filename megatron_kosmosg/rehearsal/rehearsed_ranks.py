"""Which ranks of a run are rehearsed, on which micro-batches, and what was planned for them."""

from __future__ import annotations

import math
from dataclasses import asdict

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.rank_grid import RankGrid, rank_grid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.planning.gpus import Efficiency
from megatron_kosmosg.planning.memory import RankKind, rank_kinds
from megatron_kosmosg.planning.model_counts import model_shares, whole_model
from megatron_kosmosg.planning.workload import MicroBatch, assumed_kinds, micro_batches, with_kinds
from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.frozen_files import missing_folders, with_frozen_folders
from megatron_kosmosg.rehearsal.rank_update import run_config
from megatron_kosmosg.rehearsal.stand_ins import StandIns

SCORE = "score"
"""Name of the ranks that hold the U-Net alone, as the planner calls them."""


def describe(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """Describes the case: what its config counts, and the number of ranks.

    {"stage", "precision", "notes", "micro_batch_size", "length": of every row, "images": of a
    micro-batch's prompts, "num_micro_batches": of an update, "rehearsed": of these,
    "global_batch_size": with which so many are made, "kinds": [{"name", "rank": the first of them,
    "count", "holds", "planned": bytes by use, or None}]}.
    """
    configured = with_kinds(run_config(case))
    config = with_frozen_folders(configured, stand_ins.folder)
    world = rank_grid(config, case.world_size)
    count = num_microbatches(config, world.num_replicas)
    largest = max(micro_batches(config, count), key=lambda x: (x.positions, x.prompt_images))
    rehearsed = _enough(config, world, count)
    missing = missing_folders(configured)
    notes = [f"{key} is not here: the sizes of Stable Diffusion v1.5 are taken" for key in missing]
    return {
        "stage": config.stage,
        "precision": config.training.precision,
        "notes": assumed_kinds(config) + notes,
        "micro_batch_size": config.training.micro_batch_size,
        "length": largest.length,
        "images": math.ceil(largest.prompt_images),
        "num_micro_batches": count,
        "rehearsed": rehearsed,
        "global_batch_size": rehearsed * world.num_replicas * config.training.micro_batch_size,
        "kinds": _kinds(config, world, [largest] * rehearsed),
    }


def _enough(config: RunConfig, world: RankGrid, count: int) -> int:
    """Micro-batches after which an update only repeats itself: all pipeline stages are busy then,
    and every score rank has had one."""
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    ahead = config.score.window - 1 if world.score_ranks_per_unit else 0
    return min(count, max(world.pp_size * chunks + ahead, world.score_ranks_per_unit))


def _kinds(config: RunConfig, world: RankGrid, batches: list[MicroBatch]) -> list[dict]:
    shares = model_shares(config, whole_model(config))
    is_planned = config.parallel.virtual_pipeline_model_parallel_size is None
    planned: dict[str, RankKind] = {}
    if is_planned:
        kinds = rank_kinds(config, world, shares, batches, Efficiency())
        planned = {kind.name: kind for kind in kinds}
    found = []
    for pipeline_stage, held in enumerate(shares.counts):
        name = f"decoder_stage_{pipeline_stage}" if world.pp_size > 1 else "decoder"
        ranks = world.num_replicas * world.tp_size
        found.append((name, world.decoder_rank(0, pipeline_stage, 0), ranks, held.holds))
    if world.score_ranks_per_unit:
        first = world.score_ranks(0)[0]
        found.append((SCORE, first, world.num_score_ranks, "U-Net and VAE"))
    return [
        {
            "name": name,
            "rank": rank,
            "count": count,
            "holds": holds,
            "planned": _planned(planned.get(name)),
        }
        for name, rank, count, holds in found
    ]


def _planned(kind: RankKind | None) -> dict[str, float] | None:
    if kind is None:
        return None
    return asdict(kind.memory) | {"tensors": kind.memory.tensors, "total": kind.memory.total}
