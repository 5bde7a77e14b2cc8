"""Planned launches and planned bytes of small kernels against rehearsed updates at full size."""

from __future__ import annotations

import pytest

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.models.pipeline_stage_specs import pipeline_stage_specs
from megatron_kosmosg.planning.launches import (
    UNET,
    VAE_ENCODER,
    launches,
    update_launches,
)
from megatron_kosmosg.planning.model_counts import model_shares, whole_model
from megatron_kosmosg.planning.pipeline_stage_cost import score_work
from megatron_kosmosg.planning.rates import MOVED
from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.stages import stage_facts
from tests.support.rehearsals import Rehearsals

ROWS = 4


def instruct(rehearse: Rehearsals) -> RehearsalCase:
    return rehearse.full("instruct", micro_batch=ROWS, length=215, images=6)


def pretrain(rehearse: Rehearsals) -> RehearsalCase:
    return rehearse.full("pretrain", micro_batch=1, length=2048, images=20)


def align(rehearse: Rehearsals) -> RehearsalCase:
    return rehearse.full("align", micro_batch=14, length=40, images=0)


def split(rehearse: Rehearsals) -> RehearsalCase:
    """TP2 with sequence parallelism."""
    settings = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    return rehearse.full("pretrain", *settings, micro_batch=1, length=2048, images=20)


CASES = {case.__name__: case for case in (instruct, pretrain, align, split)}


@pytest.mark.parametrize("name", CASES)
def test_launches_are_planned_within_a_tenth(rehearse, name):
    case = CASES[name](rehearse)
    config = load_config(case.config, list(case.overrides))
    (spec,) = pipeline_stage_specs(config, stage_facts(config.stage).aligner_parts)
    planned, report = launches(config, spec, True, case.images), rehearse.report(case)
    vae = VAE_ENCODER.forward if config.stage == "instruct" else 0
    assert planned.forward + vae == pytest.approx(report.kernels("forward"), rel=0.1)
    assert planned.backward == pytest.approx(report.kernels("backward"), rel=0.1)
    world = rank_grid(config, case.world_size)
    update = sum(report.phase("update")["kernels"].values())
    (held,) = model_shares(config, whole_model(config)).counts
    step = update_launches(config, world, spec, held.gradient_elements)
    assert step == pytest.approx(update, rel=0.2)


def test_the_unet_s_launches_and_its_bytes_outside_products_are_the_plan_s(rehearse):
    case = instruct(rehearse)
    config = load_config(case.config, [*case.overrides, "model.diffusion.path=null"])
    phases, report = rehearse.answer(case)["phases"], rehearse.report(case)
    ways = ("forward of the U-Net", "backward of the U-Net")
    assert [report.kernels(way) for way in ways] == pytest.approx(list(UNET), rel=0.02)
    work = {entry.module: entry for entry in score_work(config, ROWS)}
    flops = work["unet"].forward + work["unet"].backward
    assert MOVED["unet"] * flops == pytest.approx(sum(phases[w]["moved"] for w in ways), rel=0.05)
