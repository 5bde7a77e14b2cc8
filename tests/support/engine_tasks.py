"""What is rehearsed with TransformerEngine: functions for `Case.do`, in the process of
`engine_server`."""

from __future__ import annotations

import importlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_kosmosg.checkpoint.save_and_resume import checkpoint_metadata
from megatron_kosmosg.checkpoint.weights import model_state
from megatron_kosmosg.parallel import fused_adam, kernels, platform
from megatron_kosmosg.rehearsal import rank_update
from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.rank_update import (
    resolved_config,
    run_update,
    start_rank,
    take_rank,
)
from megatron_kosmosg.rehearsal.stand_ins import StandIns
from tests.support.tiny_models import tiny_config, write_stable_diffusion


def update(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """`run_update`, with {"calls": of TransformerEngine's kernels in the last update, "modules":
    {class: number of them in the model}, "optimizer": whose Adam it is}."""
    calls = importlib.import_module("tests.support.engine_kernels").calls
    found: dict[str, Any] = {}
    make_update = rank_update.Rank.update

    def noted(rank: rank_update.Rank) -> None:
        calls.clear()
        make_update(rank)
        found["modules"] = modules_of(rank)

    rank_update.Rank.update = noted
    answer = run_update(case, stand_ins)
    return answer | found | {"calls": dict(calls), "optimizer": fused_adam.install()}


def modules_of(rank: rank_update.Rank) -> dict[str, int]:
    """{class: number of modules}."""
    chunks = rank.trained.chunks
    return Counter(type(module).__name__ for chunk in chunks for module in chunk.modules())


def saved_keys(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """{"tensors": {key of a checkpoint: whole shape}}."""
    config = resolved_config(case, stand_ins)
    take_rank(case, stand_ins)
    with stand_ins.device():
        rank = start_rank(config, case, stand_ins)
        models = model_state(rank.trained.chunks, checkpoint_metadata(rank.context))
    (state,) = models.values()
    return {"tensors": {value.key: list(value.global_shape) for value in state.values()}}


def choices(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """{part: what a run takes}, as `kosmosg doctor` says."""
    return {choice.part: choice.taken for choice in kernels.kernel_choices({})}


def gpu_test(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """The code of tests/gpu: {"loss": of one global batch, "gradients": their names}."""
    folder = Path(tempfile.mkdtemp())
    stage = resolved_config(case, stand_ins).stage
    config = tiny_config(stage, write_stable_diffusion(folder), folder)
    assert platform.transformer_impl() == "transformer_engine"
    with stand_ins.device():
        module = importlib.import_module("tests.gpu.test_stages_on_gpu")
        loss, share = module.gradients_on_gpu(config, "transformer_engine")
    return {"loss": loss, "gradients": sorted(share.tensors)}
