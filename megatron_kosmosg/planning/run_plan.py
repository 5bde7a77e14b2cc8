"""The plan of a run that starts, made by its first rank for the GPU that it has."""

from __future__ import annotations

import json

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.paths import plan_file
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.files import write_text
from megatron_kosmosg.parallel.devices import gpu_name_and_gib
from megatron_kosmosg.planning.gpus import Efficiency, Gpu, gpu_named, recognised_gpu
from megatron_kosmosg.planning.memory import GIB
from megatron_kosmosg.planning.model_counts import whole_model
from megatron_kosmosg.planning.plan import plan_layout, planned_config, to_json
from megatron_kosmosg.training.against_plan import PlannedRun


def plan_the_run(config: RunConfig, world_size: int) -> PlannedRun | None:
    """Writes plan.json; None where no GPU is known or the layout's times are not planned.

    Needs a process without torch.distributed; the folder of the run has to belong to it.
    """
    gpu = _gpu_of_the_run(config)
    if gpu is None:
        return None
    try:
        planned, notes = planned_config(config, world_size, gpu)
        plan = plan_layout(planned, world_size, gpu, Efficiency(), notes, whole_model(planned))
    except ConfigError:
        return None  # as of interleaved pipeline stages; `kosmosg plan` says why
    plan_file(config).parent.mkdir(parents=True, exist_ok=True)
    write_text(plan_file(config), json.dumps(to_json(plan), indent=2) + "\n", only_writer=True)
    first = plan.estimate.kinds[0]
    speed = config.training.global_batch_size / plan.estimate.seconds
    return PlannedRun(gpu.name, speed, first.memory.total / GIB)


def _gpu_of_the_run(config: RunConfig) -> Gpu | None:
    if config.logging.planned_gpu is not None:
        return gpu_named(config.logging.planned_gpu)
    found = gpu_name_and_gib()
    return None if found is None else recognised_gpu(*found)
