"""Every two of a stage, a layout, a precision and an option meet in an update on fake GPUs.

Each case is a run of `kosmosg rehearse` at tiny size: every kind of rank of its layout. The process
with the fake GPU is that of the session.
"""

from __future__ import annotations

import pytest

from megatron_kosmosg.rehearsal.rehearsal_report import failure
from tests.support.pairwise import Choice, pairwise

LAYOUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "TP1": (1, 1, ()),
    "TP2": (2, 1, ()),
    "TP2 SP": (2, 1, ("parallel.sequence_parallel=true",)),
    "PP2": (1, 2, ()),
    "TP2 PP2": (2, 2, ()),
    "interleaved": (
        1,
        3,
        ("parallel.virtual_pipeline_model_parallel_size=2", "model.decoder.num_layers=6"),
    ),
}
"""{name: (tensor ranks, pipeline stages, further settings)}."""
OPTIONS = {
    "plain": (),
    "recompute": ("training.recompute=full", "score.recompute=true"),
    "overlap": ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
    "latent cache": ("data.latent_cache=latents",),
    "score ranks": ("score.placement=dedicated", "score.ranks_per_replica=1"),
}
FACTORS = {
    "stage": ("instruct", "pretrain", "align"),
    "layout": tuple(LAYOUTS),
    "precision": ("bf16", "fp16", "fp32"),
    "option": tuple(OPTIONS),
}
OF_INSTRUCT = ("latent cache", "score ranks")
MOST_CASES = 60


def settings(choice: Choice) -> tuple[str, ...]:
    """Two replicas, whose gradients are reduced; a micro-batch for each pipeline stage and more."""
    tensor, pipeline, more = LAYOUTS[choice["layout"]]
    return (
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        *more,
        *OPTIONS[choice["option"]],
        f"training.precision={choice['precision']}",
        f"training.global_batch_size={2 * 2 * max(2, pipeline)}",
    )


def num_gpus(choice: Choice) -> int:
    tensor, pipeline, _ = LAYOUTS[choice["layout"]]
    return 2 * (tensor * pipeline + (choice["option"] == "score ranks"))


def is_valid(choice: Choice) -> bool:
    return choice["stage"] == "instruct" or choice["option"] not in OF_INSTRUCT


CASES = pairwise(FACTORS, is_valid)


def test_the_cases_are_few_and_have_every_value_of_every_factor():
    assert len(CASES) <= MOST_CASES
    for factor, values in FACTORS.items():
        assert {choice[factor] for choice in CASES} == set(values)


@pytest.mark.parametrize("choice", CASES, ids=lambda choice: ", ".join(choice.values()))
def test_every_kind_of_rank_makes_its_update(rehearse, choice):
    report = rehearse.run(choice["stage"], *settings(choice), num_gpus=num_gpus(choice))
    assert [failure(kind) for kind in report["kinds"]] == [None] * len(report["kinds"])
    _, pipeline, _ = LAYOUTS[choice["layout"]]
    assert len(report["kinds"]) == pipeline + (choice["option"] == "score ranks")
