"""One run of a real stage whose every start has another layout than the one before it.

Saves alternate between foreground and background, so that each layout pair is passed with a whole
checkpoint: model, optimizer and position in the stream. Losses and gradient norms are those of one
rank that was never stopped, within the bounds of run_case.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kosmosg.config.schema import RunConfig
from tests.support.ranks import run_ranks
from tests.support.run_case import BOUNDS, records, run_stage
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2, "pipeline_layout": "decoder*2|decoder*1,M"}
DP2 = {"overlap_grad_reduce": True, "overlap_param_gather": True}
STARTS = ((2, TP2, True), (2, PP2, True), (2, DP2, False), (2, TP2, False), (1, {}, False))
"""(ranks, layout, saves in the background)"""
ITERATIONS = 2
"""Of each start."""


def config_of(stable_diffusion: Path, folder: Path, until: int, **parallel) -> RunConfig:
    config = tiny_config("instruct", stable_diffusion, folder, **parallel)
    config = replace_section(config, "training", train_iters=until)
    total = ITERATIONS * len(STARTS)
    config = replace_section(config, "optimizer", lr=1e-3, lr_warmup_iters=2, lr_decay_iters=total)
    return replace_section(config, "logging", tensorboard=False)


def test_a_run_goes_on_from_any_layout_to_any_other(tmp_path):
    stable_diffusion = write_stable_diffusion(tmp_path / "sd")
    total = ITERATIONS * len(STARTS)
    straight = config_of(stable_diffusion, tmp_path / "straight", total)
    run_ranks(1, run_stage, straight)
    until = 0
    for num_ranks, parallel, is_async in STARTS:
        until += ITERATIONS
        moving = config_of(stable_diffusion, tmp_path / "moving", until, **parallel)
        moving = replace_section(moving, "checkpoint", async_save=is_async)
        run_ranks(num_ranks, run_stage, moving)
    found, expected = ([r for r in records(c) if "lr" in r] for c in (moving, straight))
    assert [record["iteration"] for record in found] == list(range(1, total + 1))
    for key in ("loss", "grad_norm", "lr"):
        bound = getattr(BOUNDS["fp32"], key, 1e-12)
        values = [[record[key] for record in run] for run in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=bound), key
