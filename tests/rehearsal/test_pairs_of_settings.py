"""Every two of a stage, a layout, a precision and four options meet in an update on fake GPUs.

Each case is a run of `kosmosg rehearse` at tiny size: every kind of rank of its layout. The process
with the fake GPU is that of the session.
"""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_kosmosg.rehearsal.rehearsal_report import failure, waits
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
    "recompute": ("training.recompute=full", "score.recompute=true"),
    "overlap": ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
    "latent cache": ("data.latent_cache=latents",),
    "score ranks": ("score.placement=dedicated", "score.ranks_per_replica=1"),
}
OFF = "-"
FACTORS: dict[str, tuple[str, ...]] = {
    "stage": ("instruct", "pretrain", "align"),
    "layout": tuple(LAYOUTS),
    "precision": ("bf16", "fp16", "fp32"),
    **{option: (OFF, option) for option in OPTIONS},
}
OF_INSTRUCT = ("latent cache", "score ranks")
MOST_CASES = 60
MOST_WAITS_AN_UPDATE = 2
"""Besides that of the loop, which asks whether to stop, and with fp16 one: whether the gradients
have overflowed."""
OF_A_REQUEST = Counter(
    {
        ("host wait: cuda.Event.synchronize", "megatron_kosmosg/monitoring/stopwatch.py"): 1,
        ("host wait: copy cuda -> cpu", "megatron_kosmosg/score/service.py"): 1,
    }
)
"""What a score rank waits for: until it has nothing to do and a request may come, which is its idle
time; and for the answer that it sends."""


def settings(choice: Choice) -> tuple[str, ...]:
    """Two replicas, whose gradients are reduced; a micro-batch for each pipeline stage and more."""
    tensor, pipeline, more = LAYOUTS[choice["layout"]]
    return (
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        *more,
        *(setting for option in OPTIONS if is_on(choice, option) for setting in OPTIONS[option]),
        f"training.precision={choice['precision']}",
        f"training.global_batch_size={2 * 2 * max(2, pipeline)}",
    )


def is_on(choice: Choice, option: str) -> bool:
    return choice[option] == option


def num_gpus(choice: Choice) -> int:
    tensor, pipeline, _ = LAYOUTS[choice["layout"]]
    return 2 * (tensor * pipeline + is_on(choice, "score ranks"))


def is_valid(choice: Choice) -> bool:
    return choice["stage"] == "instruct" or not any(is_on(choice, name) for name in OF_INSTRUCT)


CASES = pairwise(FACTORS, is_valid)


def test_the_cases_are_few_and_any_two_options_meet():
    assert len(CASES) <= MOST_CASES
    for factor, values in FACTORS.items():
        assert {choice[factor] for choice in CASES} == set(values)
    for one in OPTIONS:
        for other in OPTIONS:
            assert any(is_on(choice, one) and is_on(choice, other) for choice in CASES)


def waits_of(answer: dict, of: str) -> Counter[tuple[str, str]]:
    """{(what, file): times} that the host waits for its device, of a micro-batch or an update."""
    found: Counter[tuple[str, str]] = Counter()
    for wait in waits(answer):
        if wait.of == of and wait.what.startswith("host wait"):
            found[wait.what, wait.where.partition(":")[0]] += wait.calls
    return found


@pytest.mark.parametrize("choice", CASES, ids=lambda choice: ", ".join(choice.values()))
def test_every_kind_of_rank_makes_its_update_and_its_host_stays_ahead(rehearse, choice):
    report = rehearse.run(choice["stage"], *settings(choice), num_gpus=num_gpus(choice))
    kinds = report["kinds"]
    assert [failure(kind) for kind in kinds] == [None] * len(kinds)
    _, pipeline, _ = LAYOUTS[choice["layout"]]
    assert len(kinds) == pipeline + is_on(choice, "score ranks")
    for kind in kinds:
        allowed = OF_A_REQUEST if kind["name"] == "score" else Counter()
        assert waits_of(kind["rehearsed"], "micro-batch") == allowed, kind["name"]
        an_update = waits_of(kind["rehearsed"], "update")
        most = MOST_WAITS_AN_UPDATE + (choice["precision"] == "fp16")
        assert an_update.total() <= most, (kind["name"], an_update)
