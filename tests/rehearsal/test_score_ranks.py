"""What a score rank does with its time."""

from __future__ import annotations

from megatron_kosmosg.rehearsal.case import RehearsalCase
from tests.support.rehearsals import Rehearsals


def dedicated(rehearse: Rehearsals, do: str, rank: int = 0) -> RehearsalCase:
    return rehearse.tiny(
        "instruct",
        "score.placement=dedicated",
        "training.precision=fp32",
        world_size=2,
        rank=rank,
        do=f"tests.support.rehearsal_tasks:{do}",
    )


def test_targets_are_encoded_while_the_condition_is_awaited(rehearse):
    events = rehearse.answer(dedicated(rehearse, "score_rank_order", rank=1))["events"]
    requests = [index for index, event in enumerate(events) if event == "request"]
    encoded = [events[:index].count("encode") for index in requests]
    assert all(count >= number for number, count in enumerate(encoded, start=1))


def test_a_score_rank_encodes_every_target_once(rehearse):
    events = rehearse.answer(dedicated(rehearse, "score_rank_order", rank=1))["events"]
    assert sorted(events) == ["encode", "encode", "request", "request"]


def test_images_that_are_encoded_before_a_wait_are_a_micro_batch_s(rehearse):
    """And not the update's, in whose name a rank waits."""
    settings = ("score.placement=dedicated", "training.precision=fp32")
    case = rehearse.tiny("instruct", *settings, world_size=2, rank=0)
    phases = rehearse.answer(case)["phases"]
    assert phases["images ahead"]["kernels"]["convolution"] == 1
    assert "convolution" not in phases["update"]["kernels"]
