"""The link between decoder and score ranks on NCCL, and what a score rank does with its time."""

from __future__ import annotations

from megatron_kosmosg.rehearsal.case import Case
from tests.support.marks import not_mended_yet
from tests.support.rehearsals import Rehearsals


def dedicated(rehearse: Rehearsals, do: str, rank: int = 0) -> Case:
    return rehearse.tiny(
        "instruct",
        "score.placement=dedicated",
        "training.precision=fp32",
        world_size=2,
        rank=rank,
        do=f"tests.support.rehearsal_tasks:{do}",
    )


def test_every_link_carries_something_each_way_when_it_is_opened(rehearse):
    opening = rehearse.answer(dedicated(rehearse, "links"))["phases"]["opening"]["collectives"]
    assert {"send over pair", "receive over pair"} <= set(opening)


def test_the_last_message_has_left_when_the_link_is_closed(rehearse):
    closing = rehearse.answer(dedicated(rehearse, "links"))["phases"]["closing"]
    assert closing["collectives"]["send over pair"]["calls"] > 0
    assert any("ynchronize" in wait for wait in closing["waits"])


@not_mended_yet("the VAE waits for the condition, which it ignores")
def test_targets_are_encoded_while_the_condition_is_awaited(rehearse):
    events = rehearse.answer(dedicated(rehearse, "score_rank_order", rank=1))["events"]
    requests = [index for index, event in enumerate(events) if event == "request"]
    encoded = [events[:index].count("encode") for index in requests]
    assert all(count >= number for number, count in enumerate(encoded, start=1))


def test_a_score_rank_encodes_every_target_once(rehearse):
    events = rehearse.answer(dedicated(rehearse, "score_rank_order", rank=1))["events"]
    assert sorted(events) == ["encode", "encode", "end", "request", "request"]
