"""Loss, outputs and every gradient are those of one rank, whatever the layout."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.support.layout_case import Case, single_process_config, train_step
from tests.support.ranks import run_ranks
from tests.support.shares import whole

TOLERANCE = 1e-5

HEAD = {"output_head": True}
ALIGN = {"aligner_parts": ("M", "N"), "frozen": True}
INSTRUCT = {"aligner_parts": ("M",), "split_rows": True}
BOTH = {"output_head": True, "aligner_parts": ("M", "N")}
CASES = {
    "pretrain-tp2": (2, Case(tp=2, **HEAD)),
    "pretrain-tp2-sp": (2, Case(tp=2, sequence_parallel=True, **HEAD)),
    "pretrain-pp2": (2, Case(pp=2, **HEAD)),
    "pretrain-dp2": (2, Case(**HEAD)),
    "pretrain-tp2-pp2-sp": (4, Case(tp=2, pp=2, sequence_parallel=True, **HEAD)),
    "pretrain-pp2-uneven": (2, Case(pp=2, pipeline_layout="decoder|decoder*2", **HEAD)),
    "pretrain-tp2-sp-recompute": (
        2,
        Case(tp=2, sequence_parallel=True, recompute="full", **HEAD),
    ),
    "align-tp2": (2, Case(tp=2, **ALIGN)),
    "align-tp2-sp": (2, Case(tp=2, sequence_parallel=True, **ALIGN)),
    "align-pp2": (2, Case(pp=2, **ALIGN)),
    "align-dp2": (2, Case(**ALIGN)),
    "align-pp2-n-alone": (2, Case(pp=2, pipeline_layout="decoder*3,M|N", **ALIGN)),
    "align-tp2-pp2": (4, Case(tp=2, pp=2, **ALIGN)),
    "align-pp4-all-apart": (4, Case(pp=4, pipeline_layout="decoder*2|decoder|M|N", **ALIGN)),
    "align-pp2-recompute": (2, Case(pp=2, recompute="full", **ALIGN)),
    "align-tp2-decoder-only": (2, Case(tp=2, aligner_kind="decoder_only", **ALIGN)),
    "align-tp2-none": (2, Case(tp=2, aligner_kind="none", **ALIGN)),
    "instruct-tp2": (2, Case(tp=2, **INSTRUCT)),
    "instruct-tp2-sp": (2, Case(tp=2, sequence_parallel=True, **INSTRUCT)),
    "instruct-pp2": (2, Case(pp=2, **INSTRUCT)),
    "instruct-dp2": (2, Case(**INSTRUCT)),
    "instruct-pp2-m-alone": (2, Case(pp=2, pipeline_layout="decoder*3|M", **INSTRUCT)),
    "instruct-tp2-pp2-sp": (4, Case(tp=2, pp=2, sequence_parallel=True, **INSTRUCT)),
    "instruct-tp2-pp2-sp-m-alone": (
        4,
        Case(tp=2, pp=2, sequence_parallel=True, pipeline_layout="decoder*3|M", **INSTRUCT),
    ),
    "instruct-tp2-recompute-selective": (2, Case(tp=2, recompute="selective", **INSTRUCT)),
    "all-parts-tp2-pp2-sp": (4, Case(tp=2, pp=2, sequence_parallel=True, **BOTH)),
}


@functools.cache
def reference(case: Case) -> dict:
    """The step on one rank."""
    return run_ranks(1, train_step, case)[0]


@pytest.mark.parametrize("name", CASES)
def test_layout_changes_nothing(name: str) -> None:
    num_ranks, case = CASES[name]
    expected = reference(single_process_config(case))
    results = run_ranks(num_ranks, train_step, case)

    losses = {r["dp_rank"]: r["loss"] for r in results if r["loss"] is not None}
    assert sum(losses.values()) == pytest.approx(expected["loss"], rel=1e-6)
    last = [r for r in results if r["outputs"] and r["tp_rank"] == 0]
    for result in last:
        mine = expected["outputs"][result["dp_rank"] :: len(last)]
        for got, want in zip(result["outputs"], mine, strict=True):
            assert got.keys() == want.keys()
            for key in want:
                np.testing.assert_allclose(got[key], want[key], atol=2e-5, rtol=0, err_msg=key)

    gradients = whole([r["gradients"] for r in results], tolerance=2e-6)
    wanted = whole([expected["gradients"]], tolerance=0)
    assert gradients.keys() == wanted.keys()
    largest = max(np.abs(want).max() for want in wanted.values())
    for parameter, want in wanted.items():
        scale = np.abs(want).max()
        if parameter.endswith("k_proj.bias"):
            scale = largest  # softmax ignores a shift of the keys: zero but for rounding
        error = np.abs(gradients[parameter] - want).max() / max(scale, 1e-12)
        assert error < TOLERANCE, f"{parameter}: gradient off by {error:.1e} of its maximum"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_half_precision_stays_near_single(precision: str, tp: int) -> None:
    """Two pipeline stages, sequence parallel where the tensor-parallel size allows it."""
    exact = Case(aligner_parts=("M", "N"), output_head=True)
    half = Case(
        tp=tp,
        pp=2,
        sequence_parallel=tp > 1,
        precision=precision,
        aligner_parts=("M", "N"),
        output_head=True,
    )
    expected = reference(exact)
    results = run_ranks(2 * tp, train_step, half)
    loss = next(r["loss"] for r in results if r["loss"] is not None)
    assert loss == pytest.approx(expected["loss"], rel=0.02)
    gradients = whole([r["gradients"] for r in results], tolerance=0.05)
    for parameter, want in whole([expected["gradients"]], tolerance=0).items():
        if parameter.endswith("k_proj.bias"):
            continue
        got = gradients[parameter]
        cosine = (got * want).sum() / (np.linalg.norm(got) * np.linalg.norm(want))
        assert cosine > 0.97, f"{parameter}: cosine {cosine:.3f} to the float32 gradient"
