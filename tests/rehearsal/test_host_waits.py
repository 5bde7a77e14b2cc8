"""The host stays ahead of the device: no wait inside a micro-batch, and hardly any in an update."""

from __future__ import annotations

import pytest

from megatron_kosmosg.rehearsal.case import RehearsalCase
from tests.support.rehearsals import Rehearsals

MOST_AN_UPDATE = 3
CASES = ("pretrain", "align", "instruct", "dedicated", "pipeline", "interleaved", "dedicated PP2")
_INTERLEAVED = ("parallel.virtual_pipeline_model_parallel_size=2", "model.decoder.num_layers=6")


def case(rehearse: Rehearsals, name: str) -> RehearsalCase:
    if name == "dedicated":
        return rehearse.repeated("instruct", "score.placement=dedicated", world_size=2)
    if name == "dedicated PP2":
        overrides = ("score.placement=dedicated",)
        return rehearse.repeated("instruct", *overrides, pp=2, micro_batches=4, world_size=3)
    if name == "pipeline":
        return rehearse.repeated("pretrain", pp=2, micro_batches=4)
    if name == "interleaved":
        return rehearse.repeated("pretrain", *_INTERLEAVED, pp=3, micro_batches=6)
    return rehearse.repeated(name)


@pytest.mark.parametrize("name", CASES)
def test_the_host_never_waits_inside_a_micro_batch(rehearse, name):
    assert rehearse.report(case(rehearse, name)).of_a_micro_batch("waits") == {}


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_three_times_an_update_at_most(rehearse, name):
    """What a pass tells the host comes in one transfer; a decoder rank with score ranks asks first
    how long it has waited for them. The loop asks once more, whether to stop."""
    waits = rehearse.report(case(rehearse, name)).phase("update")["waits"]
    assert sum(waits.values()) + 1 <= MOST_AN_UPDATE


def test_no_line_waits_once_for_every_trained_tensor(rehearse):
    waits = rehearse.report(rehearse.repeated("instruct")).phase("update")["waits"]
    assert max(waits.values()) == 1


def test_a_wait_is_named_by_the_line_that_waits(rehearse):
    waits = rehearse.report(rehearse.repeated("instruct")).phase("update")["waits"]
    assert waits and all(" at megatron_kosmosg/" in wait for wait in waits), waits
