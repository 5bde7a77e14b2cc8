"""All three stages on every layout against one rank: the same loss and the same gradients.

fp32, dropout 0, odd vocabulary, odd numbers of queries and layers. The bound, 1e-5 of a gradient's
largest entry, is far above the round-off of another summation order (about 1e-6) and far below any
error of logic.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest

from tests.support.ranks import run_ranks
from tests.support.shares import whole
from tests.support.stage_gradients import stage_gradients
from tests.support.tiny_models import tiny_config, write_stable_diffusion

LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "pipeline_layout": "decoder*2|decoder*1{tail}"}),
    # The distributed optimizer would leave each rank the reduced gradient of its own shard only.
    "dp2": (2, {"use_distributed_optimizer": False}),
    # A bucket waits for all its parameters: each must get a gradient from every micro-batch.
    "dp2_overlap": (2, {"use_distributed_optimizer": False, "overlap_grad_reduce": True}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
                    "pipeline_layout": "decoder*2|decoder*1{tail}"}),
}  # fmt: skip
ZERO_GRADIENT = "self_attn.k_proj.bias"
TAILS = {"pretrain": "", "align": ",M,N", "instruct": ",M"}
TRAINED = {
    "pretrain": ("embedding", "decoder", "resampler", "vision_encoder"),
    "align": ("aligner_m", "aligner_n"),
    "instruct": ("embedding", "decoder", "resampler", "vision_encoder", "aligner_m"),
}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("sd"))


PACKED_LAYOUTS = {
    "one_rank": (1, {}),
    **{name: LAYOUTS[name] for name in ("tp2", "tp2_sp", "pp2", "dp2")},
}


def gradients(
    stage,
    folder,
    output_dir,
    world_size,
    parallel,
    precision="fp32",
    packs=False,
    recompute="none",
    alone=False,
):
    parallel = {
        key: value.format(tail=TAILS[stage]) if isinstance(value, str) else value
        for key, value in parallel.items()
    }
    config = tiny_config(stage, folder, output_dir, **parallel)
    # Null rows must carry gradient in this comparison, so half the conditions are dropped.
    score = dataclasses.replace(config.score, condition_drop_prob=0.5)
    training = dataclasses.replace(config.training, precision=precision, recompute=recompute)
    data = dataclasses.replace(config.data, pack_prompts=packs)
    config = dataclasses.replace(config, score=score, training=training, data=data)
    results = run_ranks(world_size, partial(stage_gradients, alone=alone), config)
    tp = config.parallel.tensor_model_parallel_size
    loss = sum(total for total, _ in results) / tp
    return loss, whole([share for _, share in results], tolerance=1e-5)


@pytest.fixture(scope="module")
def single_process(stable_diffusion, tmp_path_factory):
    known = {}

    def compute(stage):
        if stage not in known:
            folder = tmp_path_factory.mktemp(stage)
            known[stage] = gradients(stage, stable_diffusion, folder, 1, {})
        return known[stage]

    return compute


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", TAILS)
def test_loss_and_gradients_equal_those_of_one_rank(
    stage, layout, single_process, stable_diffusion, tmp_path
):
    found = gradients(stage, stable_diffusion, tmp_path, *LAYOUTS[layout])
    check_equal(found, single_process(stage))


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_packed_prompts_learn_the_same(layout, single_process, stable_diffusion, tmp_path):
    found = gradients("instruct", stable_diffusion, tmp_path, *PACKED_LAYOUTS[layout], packs=True)
    check_equal(found, single_process("instruct"))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_packed_prompts_are_recomputed_packed(
    recompute, single_process, stable_diffusion, tmp_path
):
    found = gradients(
        "instruct", stable_diffusion, tmp_path, 1, {}, packs=True, recompute=recompute
    )
    check_equal(found, single_process("instruct"))


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_a_packed_caption_counts_as_it_does_alone(layout, alone, stable_diffusion, tmp_path):
    """Padding counts in the loss of `align`, so without it the loss is that of captions alone."""
    found = gradients("align", stable_diffusion, tmp_path, *PACKED_LAYOUTS[layout], packs=True)
    check_equal(found, alone)


@pytest.fixture(scope="module")
def alone(stable_diffusion, tmp_path_factory, single_process):
    expected = gradients(
        "align", stable_diffusion, tmp_path_factory.mktemp("alone"), 1, {}, alone=True
    )
    padded_loss, _ = single_process("align")
    assert expected[0] != pytest.approx(padded_loss, rel=1e-3), "padding makes no difference"
    return expected


def check_equal(result, reference):
    (loss, found), (expected_loss, expected) = result, reference
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    wrong = {}
    for key, gradient in expected.items():
        # Softmax ignores a constant added to all keys: this gradient is zero but for round-off.
        scale = largest if key.endswith(ZERO_GRADIENT) else np.abs(gradient).max()
        error = np.abs(found[key] - gradient).max() / scale
        if error > 1e-5:
            wrong[key] = error
    assert not wrong, wrong


@pytest.mark.parametrize("stage", TAILS)
def test_exactly_the_named_parts_train(stage, single_process):
    _, found = single_process(stage)
    assert {key.split(".")[0] for key in found} == set(TRAINED[stage])
    silent = [key for key, gradient in found.items() if not gradient.any()]
    assert not silent, f"no gradient reaches {silent}"


@pytest.mark.parametrize("stage", TAILS)
def test_bf16_stays_near_fp32(stage, single_process, stable_diffusion, tmp_path):
    """The real stages in half precision: their outputs are half, their losses are not."""
    expected_loss, expected = single_process(stage)
    loss, found = gradients(stage, stable_diffusion, tmp_path, *LAYOUTS["tp2"], precision="bf16")
    assert loss == pytest.approx(expected_loss, rel=5e-3)
    for key, wanted in expected.items():
        if not key.endswith(ZERO_GRADIENT):
            lengths = np.linalg.norm(found[key]) * np.linalg.norm(wanted)
            cosine = (found[key] * wanted).sum() / lengths
            assert cosine > 0.9, f"{key}: cosine {cosine:.3f}"
