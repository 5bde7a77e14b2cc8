"""Planned memory against the tensors of a rehearsed update at full size."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_kosmosg.rehearsal.case import Case
from tests.support.marks import not_mended_yet
from tests.support.rehearsals import Rehearsals

HELD = {"frozen_helpers": ("frozen_helpers",), "model": ("parameters", "gradients")}
HELD |= {"optimizer": ("optimizer",)}
"""{counted: planned}, between updates."""
STAGES = ("instruct", "pretrain")


def case(rehearse: Rehearsals, stage: str) -> Case:
    if stage == "instruct":
        return rehearse.full("instruct", micro_batch=4, length=215, images=6)
    return rehearse.full("pretrain", micro_batch=1, length=2048, images=20)


def planned(rehearse: Rehearsals, rehearsed: Case) -> dict:
    return rehearse.answer(dataclasses.replace(rehearsed, do="tests.support.rehearsal_tasks:plan"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("part", HELD)
def test_weights_gradients_and_optimizer_are_planned_exactly(rehearse, stage, part):
    rehearsed = case(rehearse, stage)
    counted = rehearse.answer(rehearsed)["held"][part]
    plan = planned(rehearse, rehearsed)
    assert sum(plan[name] for name in HELD[part]) == pytest.approx(counted, rel=1e-4)


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(
            "instruct",
            marks=not_mended_yet("8 % more planned than counted"),
        ),
        "pretrain",
    ],
)
def test_what_an_update_takes_beside_them_is_planned_within_five_percent(rehearse, stage):
    rehearsed = case(rehearse, stage)
    report, plan = rehearse.report(rehearsed), planned(rehearse, rehearsed)
    counted = report.peak - report.answer["held"]["total"]
    work = plan["activations"] + plan["score_activations"]
    assert work == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("stage", STAGES)
def test_the_whole_is_planned_within_five_percent(rehearse, stage):
    rehearsed = case(rehearse, stage)
    plan = planned(rehearse, rehearsed)
    assert plan["tensors"] == pytest.approx(rehearse.report(rehearsed).peak, rel=0.05)
