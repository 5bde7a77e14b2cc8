"""Planned memory against the tensors of rehearsed updates and of a score rank's requests, all of
them at full size."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.rehearsal_report import attention, peak
from tests.support.rehearsals import Rehearsals

HELD = {"frozen_helpers": ("frozen_helpers",), "model": ("parameters", "gradients")}
HELD |= {"optimizer": ("optimizer",)}
"""{counted: planned}, between updates."""


SPLIT = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")


def instruct(rehearse: Rehearsals, rows: int = 4, *overrides: str) -> RehearsalCase:
    images = rows * 3 // 2
    return rehearse.full("instruct", *overrides, micro_batch=rows, length=215, images=images)


def instruct_16(rehearse: Rehearsals) -> RehearsalCase:
    return instruct(rehearse, 16)


def instruct_split(rehearse: Rehearsals) -> RehearsalCase:
    """Eight rows on four replicas of two tensor ranks."""
    return instruct(rehearse, 8, *SPLIT, "training.global_batch_size=32")


def pretrain(rehearse: Rehearsals, rows: int = 1, *overrides: str) -> RehearsalCase:
    return rehearse.full("pretrain", *overrides, micro_batch=rows, length=2048, images=20 * rows)


def pretrain_4(rehearse: Rehearsals) -> RehearsalCase:
    return pretrain(rehearse, 4)


def first_stage(rehearse: Rehearsals) -> RehearsalCase:
    """Two replicas of two tensor ranks on each of two pipeline stages, two micro-batches."""
    pipeline = "parallel.pipeline_model_parallel_size=2"
    return pretrain(rehearse, 1, *SPLIT, pipeline, "training.global_batch_size=4")


def second_stage(rehearse: Rehearsals) -> RehearsalCase:
    first = first_stage(rehearse)
    return rehearse.behind(first, first)


def align(rehearse: Rehearsals) -> RehearsalCase:
    return rehearse.full("align", micro_batch=14, length=40, images=0)


def score(rehearse: Rehearsals) -> RehearsalCase:
    return rehearse.score_rank()


def recomputed(rehearse: Rehearsals) -> RehearsalCase:
    return pretrain(rehearse, 4, "training.recompute=full", "optimizer.ema_decay=0.9999")


def offloaded(rehearse: Rehearsals) -> RehearsalCase:
    states = "optimizer.optimizer_cpu_offload=true"
    return dataclasses.replace(align(rehearse), overrides=(*align(rehearse).overrides, states))


CASES = {
    each.__name__: each
    for each in (
        instruct,
        instruct_16,
        instruct_split,
        pretrain,
        pretrain_4,
        first_stage,
        second_stage,
        recomputed,
        align,
        offloaded,
        score,
    )
}


def case(rehearse: Rehearsals, name: str) -> RehearsalCase:
    return CASES[name](rehearse)


@pytest.mark.parametrize("name", [name for name in CASES if name != "score"])
@pytest.mark.parametrize("part", HELD)
def test_weights_gradients_and_optimizer_are_planned_exactly(rehearse, name, part):
    rehearsed = case(rehearse, name)
    counted = rehearse.answer(rehearsed)["held"][part]
    plan = rehearse.planned(rehearsed)
    # What the device still has of an optimizer on the host are counters, of 512 bytes each.
    assert sum(plan[name] for name in HELD[part]) == pytest.approx(counted, rel=1e-4, abs=1 << 14)


@pytest.mark.parametrize("name", CASES)
def test_what_an_update_takes_beside_them_is_planned_within_five_percent(rehearse, name):
    rehearsed = case(rehearse, name)
    answer, plan = rehearse.answer(rehearsed), rehearse.planned(rehearsed)
    work = plan["activations"] + plan["score_activations"]
    counted = peak(answer) - answer["held"]["total"]
    assert work == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_is_planned_within_five_percent(rehearse, name):
    rehearsed = case(rehearse, name)
    counted = peak(rehearse.answer(rehearsed))
    assert rehearse.planned(rehearsed)["tensors"] == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_no_attention_writes_its_matrix_out(rehearse, name):
    assert set(attention(rehearse.answer(case(rehearse, name)))) <= {"flash", "efficient"}
