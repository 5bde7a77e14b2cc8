"""When a checkpoint's random state fits the ranks of the run that continues it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_kosmosg.checkpoint.layout_signature import (
    OTHER_LAYOUT,
    UNKNOWN_SPLIT,
    compare_layouts,
    layout_signature,
)
from megatron_kosmosg.config.schema import ParallelConfig
from megatron_kosmosg.parallel.context import single_process_context


def signature(pp: int = 2, vp: int | None = None, split: str | None = "decoder*3|decoder*1"):
    parallel = ParallelConfig(virtual_pipeline_model_parallel_size=vp, pipeline_layout=split)
    context = replace(single_process_context("cpu"), tp_size=2, pp_size=pp, dp_size=4)
    return layout_signature(context, parallel)


def test_the_same_split_in_other_spacing_is_the_same_layout():
    assert compare_layouts(signature(split="decoder*3 | decoder*1"), signature()) == (True, [])


@pytest.mark.parametrize(
    "saved",
    [signature(split="decoder*2|decoder*2"), signature(pp=4), signature(vp=2)],
    ids=["split", "sizes", "chunks"],
)
def test_another_layout_is_said(saved):
    assert compare_layouts(saved, signature()) == (False, [OTHER_LAYOUT])


def test_fields_that_a_checkpoint_lacks_are_unknown_not_different():
    old = {"tp": 2, "pp": 2, "dp": 4}
    assert compare_layouts(old, signature()) == (True, [UNKNOWN_SPLIT])
    assert compare_layouts({**old, "pp": 1}, signature(pp=1, split=None)) == (True, [])


def test_an_old_checkpoint_that_says_nothing_of_chunks_had_one():
    old = {"tp": 2, "pp": 2, "dp": 4}
    assert compare_layouts(old, signature(vp=2)) == (False, [OTHER_LAYOUT])


def test_a_split_does_not_matter_where_there_is_one_stage():
    assert signature(pp=1, split="decoder*4")["pipeline_layout"] is None
