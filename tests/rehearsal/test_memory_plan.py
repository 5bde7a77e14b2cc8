"""Planned memory against the tensors of rehearsed updates, five of them at full size."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.rehearsal_report import attention, peak
from tests.support.rehearsals import Rehearsals

HELD = {"frozen_helpers": ("frozen_helpers",), "model": ("parameters", "gradients")}
HELD |= {"optimizer": ("optimizer",)}
"""{counted: planned}, between updates."""


def instruct(rehearse: Rehearsals) -> RehearsalCase:
    return rehearse.full("instruct", micro_batch=4, length=215, images=6)


def pretrain(rehearse: Rehearsals, rows: int = 1, *overrides: str) -> RehearsalCase:
    return rehearse.full("pretrain", *overrides, micro_batch=rows, length=2048, images=20 * rows)


def align(rehearse: Rehearsals) -> RehearsalCase:
    return rehearse.full("align", micro_batch=14, length=40, images=0)


def score(rehearse: Rehearsals) -> RehearsalCase:
    return rehearse.full(
        "instruct",
        "score.placement=dedicated",
        "score.ranks_per_replica=1",
        "training.global_batch_size=32",
        micro_batch=8,
        length=215,
        images=0,
        rank=1,
        do="megatron_kosmosg.rehearsal.rehearsed_score_rank:run_service",
    )


def recomputed(rehearse: Rehearsals) -> RehearsalCase:
    return pretrain(rehearse, 4, "training.recompute=full", "optimizer.ema_decay=0.9999")


def offloaded(rehearse: Rehearsals) -> RehearsalCase:
    states = "optimizer.optimizer_cpu_offload=true"
    return dataclasses.replace(align(rehearse), overrides=(*align(rehearse).overrides, states))


CASES = {each.__name__: each for each in (instruct, pretrain, recomputed, align, offloaded, score)}


def case(rehearse: Rehearsals, name: str) -> RehearsalCase:
    return CASES[name](rehearse)


def planned(rehearse: Rehearsals, rehearsed: RehearsalCase) -> dict:
    return rehearse.answer(dataclasses.replace(rehearsed, do="tests.support.rehearsal_tasks:plan"))


@pytest.mark.parametrize("name", ["instruct", "pretrain", "recomputed", "offloaded"])
@pytest.mark.parametrize("part", HELD)
def test_weights_gradients_and_optimizer_are_planned_exactly(rehearse, name, part):
    rehearsed = case(rehearse, name)
    counted = rehearse.answer(rehearsed)["held"][part]
    plan = planned(rehearse, rehearsed)
    # What the device still has of an optimizer on the host are counters, of 512 bytes each.
    assert sum(plan[name] for name in HELD[part]) == pytest.approx(counted, rel=1e-4, abs=1 << 14)


@pytest.mark.parametrize("name", CASES)
def test_what_an_update_takes_beside_them_is_planned_within_five_percent(rehearse, name):
    rehearsed = case(rehearse, name)
    answer, plan = rehearse.answer(rehearsed), planned(rehearse, rehearsed)
    work = plan["activations"] + plan["score_activations"]
    counted = peak(answer) - answer["held"]["total"]
    assert work == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_is_planned_within_five_percent(rehearse, name):
    rehearsed = case(rehearse, name)
    counted = peak(rehearse.answer(rehearsed))
    assert planned(rehearse, rehearsed)["tensors"] == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_no_attention_writes_its_matrix_out(rehearse, name):
    assert set(attention(rehearse.answer(case(rehearse, name)))) <= {"flash", "efficient"}
