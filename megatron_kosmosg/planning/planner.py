"""From a config and a number of GPUs to a plan: of the layout in the config, or of the best one."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.config.world import world_layout
from megatron_kosmosg.planning.comparison import as_dict, faster_layouts, in_words, reasons
from megatron_kosmosg.planning.estimate import estimate
from megatron_kosmosg.planning.gpus import Efficiency, Gpu
from megatron_kosmosg.planning.model_counts import ModelShares, model_shares, whole_model
from megatron_kosmosg.planning.pipeline_balance import with_default_layout
from megatron_kosmosg.planning.plan import Plan
from megatron_kosmosg.planning.search import search
from megatron_kosmosg.planning.shards import build_shards
from megatron_kosmosg.planning.workload import assumed_kinds, with_kinds

IDLE_GOAL = 0.05
_BATCHES = (1, 2, 4, 8, 16, 32)


def planned_config(config: RunConfig, world_size: int, gpu: Gpu) -> tuple[RunConfig, list[str]]:
    """`config` made for `world_size` GPUs of that sort, with the kinds of its datasets, and notes:
    what was changed for it or assumed. Raises as `with_kinds` does."""
    config = with_kinds(config)
    notes = assumed_kinds(config)
    if config.training.precision == "bf16" and not gpu.bf16_tflops:
        config = replace(config, training=replace(config.training, precision="fp16"))
        notes.append(f"{gpu.name} has no bf16 arithmetic: training.precision=fp16 is planned")
    return replace(config, parallel=replace(config.parallel, world_size=world_size)), notes


def make_plan(
    config: RunConfig, world_size: int, gpu: Gpu, efficiency: Efficiency, notes: list[str]
) -> Plan:
    """The plan of the layout in `config`, with those that are planned faster.

    Raises ConfigError when it is not valid.
    """
    validate_layout(config, world_size)
    if config.parallel.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError(
            "times of interleaved stages are not planned; add "
            "parallel.virtual_pipeline_model_parallel_size=null (train --dry-run shows who does "
            "what with them)"
        )
    config = with_default_layout(config)
    model = whole_model(config)
    plan = _plan(config, world_size, gpu, efficiency, notes, model)
    found = search(config, world_size, gpu, efficiency, model).candidates
    return replace(plan, faster=faster_layouts(config, plan.estimate, found))


def _plan(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    efficiency: Efficiency,
    notes: list[str],
    model: torch.nn.Module,
) -> Plan:
    world = world_layout(config, world_size)
    shares = model_shares(config, model)
    planned = estimate(config, world, gpu, efficiency, shares)
    if config.stage == "instruct":
        notes = [*notes, _idle_note(config, world_size, gpu, efficiency, shares)]
    return Plan(config, gpu, efficiency, planned, build_shards(config, world), notes, faster=[])


def search_plan(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    efficiency: Efficiency,
    notes: list[str],
    top: int,
) -> tuple[Plan, str, dict]:
    """The plan of the fastest layout, the list of the `top` fastest as text, both for the JSON."""
    model = whole_model(config)
    result = search(config, world_size, gpu, efficiency, model)
    best = result.candidates[0]
    plan = _plan(best.config, world_size, gpu, efficiency, notes, model)
    settings, why = best.choice.overrides(config.stage), reasons(result)
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


def _idle_note(
    config: RunConfig, world_size: int, gpu: Gpu, efficiency: Efficiency, shares: ModelShares
) -> str:
    """The smallest multiple of the batch at which decoder ranks idle less than the goal."""
    training = config.training
    for times in _BATCHES:
        larger = replace(training, global_batch_size=times * training.global_batch_size)
        planned = estimate(
            replace(config, training=larger),
            world_layout(config, world_size), gpu, efficiency, shares,
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
