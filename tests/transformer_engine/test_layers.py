"""With TransformerEngine's own Python, its kernels replaced: layers are made, run forward and
backward, also without images, models are counted on the meta device, and gradients are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_kosmosg.rehearsal.case import RehearsalCase
from tests.support.rehearsals import Rehearsals, Report

STAGES = ("pretrain", "align", "instruct")
DECODER, RESAMPLER, ALIGNER = 2 * 4, 3, 4 + 4 + 3
"""Linears of the tiny models: two layers of the decoder, the resampler's cross-attention, one
encoder and one decoder layer of AlignerNet, of which `align` has two."""
FORWARD = {
    "pretrain": DECODER + RESAMPLER,
    "align": DECODER + 2 * ALIGNER,  # captions have no images
    "instruct": DECODER + RESAMPLER + ALIGNER,
}
BACKWARD = FORWARD | {"align": 2 * ALIGNER}
UNFUSED, FUSED = "gemm NT", "gemm NT into its buffer"
"""The product that is a weight's gradient, by itself and added to the sum over micro-batches."""
UPDATE = "tests.support.engine_tasks:update"


def task(engine: Rehearsals, stage: str, do: str, **fields: object) -> RehearsalCase:
    return engine.tiny(stage, do=f"tests.support.engine_tasks:{do}", **fields)


def updated(engine: Rehearsals, stage: str, *overrides: str, **fields: object) -> Report:
    """The first update."""
    return engine.report(engine.tiny(stage, *overrides, do=UPDATE, **fields))


def updated_again(engine: Rehearsals, stage: str) -> Report:
    """An update without what a run does once."""
    return engine.report(engine.repeated(stage, do=UPDATE))


def attention(report: Report) -> dict[str, int]:
    calls = report.answer["calls"]
    return {name: number for name, number in calls.items() if name.startswith("attention")}


def test_a_run_takes_what_is_there(engine):
    taken = engine.answer(task(engine, "pretrain", "choices"))
    assert taken["layers"] == "TransformerEngine's linears and causal attention"
    assert taken["optimizer"] == "TransformerEngine's FusedAdam"


@pytest.mark.parametrize("stage", STAGES)
def test_every_linear_and_causal_attention_of_a_stage(engine, stage):
    report = updated_again(engine, stage)
    calls, modules = report.answer["calls"], report.answer["modules"]
    assert calls["gemm TN"] == FORWARD[stage]
    assert calls["gemm NN"] == calls[FUSED] == BACKWARD[stage]
    assert UNFUSED not in calls
    (kind,) = attention(report)
    assert "CAUSAL" in kind and calls[kind] == modules["TEDotProductAttention"] == 2
    assert calls.get("backward of attention", 0) == (0 if stage == "align" else 2)
    assert not {"ColumnParallelLinear", "RowParallelLinear"} & set(modules)


@pytest.mark.parametrize("stage", STAGES)
def test_its_adam_makes_the_update(engine, stage):
    report = updated_again(engine, stage)
    assert report.answer["optimizer"] == "transformer_engine"
    assert report.answer["calls"]["adam"] >= 1


@pytest.mark.parametrize("stage", STAGES)
def test_the_host_waits_once_an_update(engine, stage):
    report = updated_again(engine, stage)
    assert report.of_a_micro_batch("waits") == {}
    assert sum(report.phase("update")["waits"].values()) == 1


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_a_micro_batch_without_images_asks_for_no_empty_product(engine, stage):
    """`align` never has any."""
    report = updated(engine, stage, images=0)
    assert report.answer["calls"]["gemm TN"] == FORWARD[stage] - RESAMPLER
    assert report.kernels("backward") > 0


@pytest.mark.parametrize("stage", STAGES)
def test_models_are_counted_on_the_meta_device(engine, stage):
    case = engine.tiny(stage, do="tests.support.rehearsal_tasks:plan")
    assert engine.answer(case)["trainable"] > 10_000


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_it_gathers_and_scatters_the_sequence_itself(engine, stage):
    report = updated(engine, stage, tp=2)
    scattered = report.phase("forward")["collectives"][
        "reduce_scatter over TENSOR_MODEL_PARALLEL_GROUP of 2"
    ]
    assert scattered["calls"] == 2 * 2  # twice in each of the decoder's layers
    assert report.kernels("backward") > 0


def test_both_of_two_pipeline_stages(engine):
    case = engine.tiny("instruct", pp=2, do=UPDATE)
    first, behind = engine.report(case), engine.report(engine.behind(case, case))
    modules = [report.answer["modules"] for report in (first, behind)]
    assert sum(found.get("TEDotProductAttention", 0) for found in modules) == 2
    assert all(found["TEColumnParallelLinear"] > 0 for found in modules)
    assert first.kernels("backward") > 0 and behind.kernels("backward") > 0


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_packed_prompts_are_one_row_to_its_attention(engine, stage):
    (kind,) = attention(updated(engine, stage, "data.pack_prompts=true"))
    assert "Layout.TH3D" in kind and "PADDING_CAUSAL" in kind


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("pretrain", ["training.recompute=full"]),
        ("pretrain", ["training.precision=fp32"]),
        ("instruct", ["training.precision=fp16", "score.recompute=true"]),
        ("instruct", ["lora.rank=4"]),
        ("align", ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_settings(engine, stage, settings):
    world_size = 2 if "overlap" in settings[0] else 1
    report = updated(engine, stage, *settings, world_size=world_size)
    assert report.answer["calls"]["gemm TN"] >= FORWARD[stage]
    assert report.kernels("backward") > 0


@pytest.mark.parametrize("stage", ["pretrain", "align"])
def test_checkpoints_are_those_of_the_other_layers(engine, without, stage):
    of_engine = engine.answer(task(engine, stage, "saved_keys"))
    of_torch = without.answer(task(without, stage, "saved_keys"))
    assert of_engine["tensors"] == of_torch["tensors"] and len(of_torch["tensors"]) > 20


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_the_code_of_the_gpu_tests_runs_with_it(engine, stage):
    answer = engine.answer(task(engine, stage, "gpu_test"))
    assert isinstance(answer["loss"], float) and len(answer["gradients"]) > 20


def test_weight_gradients_are_added_where_they_are_summed(engine):
    """Without apex, whose kernel the head's linear would need: its gradient stays apart."""
    taken = engine.answer(task(engine, "pretrain", "choices"))
    assert taken["weight gradients"].endswith("by TransformerEngine's matrix products")
    fused = updated(engine, "pretrain")
    apart = updated(engine, "pretrain", "performance.gradient_accumulation_fusion=false")
    assert fused.answer["calls"][FUSED] == apart.answer["calls"][UNFUSED] == BACKWARD["pretrain"]
    assert UNFUSED not in fused.answer["calls"] and FUSED not in apart.answer["calls"]


def test_frozen_weights_get_no_gradient_in_their_buffer(engine):
    """Where adapters train, the linears of decoder and resampler have no buffer."""
    calls = updated(engine, "instruct", "lora.rank=4").answer["calls"]
    assert calls[FUSED] == ALIGNER and UNFUSED not in calls


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `engine_numbers` writes."""
    folder = tmp_path_factory.mktemp("numbers")
    subprocess.run([sys.executable, "-m", "tests.support.engine_numbers", str(folder)], check=True)
    return folder


@pytest.mark.parametrize("kind", ["unfused", "fused"])
@pytest.mark.parametrize("stage", STAGES)
def test_loss_and_gradients_are_those_of_megatrons_own_linears(numbers, stage, kind):
    """Over two micro-batches, in float32. The products are the stand-in's; which of them are made
    of what, and where their results are added, is TransformerEngine's and Megatron-Core's code."""
    expected, found = (dict(np.load(numbers / f"{stage}-{x}.npz")) for x in ("local", kind))
    said = {x: json.loads((numbers / f"{stage}-{x}.json").read_text()) for x in ("local", kind)}
    product = FUSED if kind == "fused" else UNFUSED
    assert said["local"]["calls"] == {} and said[kind]["calls"][product] > 2 * DECODER
    assert said[kind]["loss"] == pytest.approx(said["local"]["loss"], rel=1e-6)
    assert found.keys() == expected.keys() and len(expected) > 20
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in expected.items():
        bound = 1e-5 * max(np.abs(gradient).max(), 1e-3 * largest)
        assert np.abs(found[name] - gradient).max() <= bound, name


def test_its_python_alone_is_said_and_not_used():
    """As `pip install transformer-engine` leaves it."""
    environment = {k: v for k, v in os.environ.items() if k != "NVTE_PROJECT_BUILDING"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_kosmosg", "doctor"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "Found empty `transformer-engine` meta package" in output, (
        output
    )
    assert "Traceback" not in output
