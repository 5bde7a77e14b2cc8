"""The U-Net on ranks of its own: the same losses, gradients and images as beside the decoder.

fp32, dropout 0, half of the conditions dropped so that the null row carries gradient. The bound is
that of test_stage_parity.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.ranks import run_ranks
from tests.support.score_case import placed_update, update_with_trouble
from tests.support.shares import whole
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion

BOUND = 1e-5
ZERO_GRADIENT = "self_attn.k_proj.bias"
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2, "pipeline_layout": "decoder*2|decoder*1,M"}
PLACEMENTS = {
    "k1": (2, {}, {}),
    "k2": (3, {}, {"ranks_per_replica": 2}),
    "k3": (4, {}, {"ranks_per_replica": 3, "window": 3}),
    "narrow_window": (2, {}, {"window": 1}),
    "tp2_sp_k1": (3, {**TP2, "sequence_parallel": True}, {}),
    "tp2_k2": (4, TP2, {"ranks_per_replica": 2}),
    "pp2_k1": (3, PP2, {}),
    "pp2_k2": (4, PP2, {"ranks_per_replica": 2, "window": 1}),
    "dp2_k1": (4, {}, {}),
    "dp2_shared": (3, {}, {"replicas_per_rank": 2}),
    "tp2_pp2_k1": (5, {**TP2, **PP2}, {}),
}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("sd"))


def config_of(stable_diffusion, parallel, score, samples=8, rows=2):
    # The distributed optimizer would leave each rank the reduced gradient of its own shard only.
    config = tiny_config(
        "instruct",
        stable_diffusion,
        stable_diffusion,
        use_distributed_optimizer=False,
        **parallel,
    )
    config = replace_section(config, "score", condition_drop_prob=0.5, **score)
    config = replace_section(config, "training", global_batch_size=samples, micro_batch_size=rows)
    return replace_section(config, "logging", num_images=2, num_inference_steps=2)


def check_equal(results, expected):
    decoders = [result for result in results if not result.is_score_rank]
    tp_size = 1 + max(result.share.tp_rank for result in decoders)
    loss = sum(result.loss for result in decoders) / tp_size
    assert loss == pytest.approx(expected.loss, rel=BOUND)
    found, wanted = (
        whole(shares, tolerance=BOUND)
        for shares in ([result.share for result in decoders], [expected.share])
    )
    assert found.keys() == wanted.keys()
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for key, gradient in wanted.items():
        scale = largest if key.endswith(ZERO_GRADIENT) else np.abs(gradient).max()
        assert np.abs(found[key] - gradient).max() <= BOUND * scale, key
    for result in decoders:
        assert result.heldout_loss == pytest.approx(expected.heldout_loss, rel=BOUND)
    (grid,) = [result.grid for result in decoders if result.grid is not None]
    assert np.abs(grid.astype(int) - expected.grid).max() <= 2


@pytest.fixture(scope="module")
def colocated(stable_diffusion):
    (expected,) = run_ranks(1, placed_update, config_of(stable_diffusion, {}, {}))
    assert expected.loss > 0 and expected.grid.std() > 10
    return expected


@pytest.mark.parametrize("name", PLACEMENTS)
def test_dedicated_ranks_change_nothing(name, colocated, stable_diffusion):
    num_ranks, parallel, score = PLACEMENTS[name]
    config = config_of(stable_diffusion, parallel, {"placement": "dedicated", **score})
    results = run_ranks(num_ranks, placed_update, config)
    check_equal(results, colocated)
    for result in results:
        held = ("AutoencoderKL", "UNet2DConditionModel") if result.is_score_rank else ("KosmosG",)
        assert result.modules == held
        assert not result.unet_changed


@pytest.mark.parametrize("name", ["colocated", "k1", "tp2_sp_k1", "tp2_k2", "pp2_k1"])
def test_packed_prompts_change_nothing(name, colocated, stable_diffusion):
    num_ranks, parallel, score = (1, {}, {}) if name == "colocated" else PLACEMENTS[name]
    placement = "colocated" if name == "colocated" else "dedicated"
    config = config_of(stable_diffusion, parallel, {"placement": placement, **score})
    config = replace_section(config, "data", pack_prompts=True)
    check_equal(run_ranks(num_ranks, placed_update, config), colocated)


def test_rows_are_split_where_micro_batches_are_few(stable_diffusion):
    """One micro-batch of two rows over three score ranks: one of them gets none."""
    sizes = {"samples": 2, "rows": 2}
    (expected,) = run_ranks(1, placed_update, config_of(stable_diffusion, {}, {}, **sizes))
    score = {"placement": "dedicated", "ranks_per_replica": 3}
    config = config_of(stable_diffusion, {}, score, **sizes)
    check_equal(run_ranks(4, placed_update, config), expected)


def test_loss_scale_travels_with_the_condition(colocated, stable_diffusion):
    """bf16 and fp16 stay near fp32, whose gradients a lost scale would miss a thousandfold."""
    for precision in ("bf16", "fp16"):
        config = config_of(stable_diffusion, {}, {"placement": "dedicated"})
        config = replace_section(config, "training", precision=precision)
        result = run_ranks(2, placed_update, config)[0]
        assert result.loss == pytest.approx(colocated.loss, rel=1e-2)
        scale = config.optimizer.initial_loss_scale if precision == "fp16" else 1.0
        for key, wanted in colocated.share.tensors.items():
            if not key.endswith(ZERO_GRADIENT):
                found = result.share.tensors[key] / scale
                error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
                assert error < 0.5, f"{precision} {key}: {error:.3f}"


def test_a_raising_score_rank_ends_the_run_with_its_own_error(stable_diffusion):
    config = config_of(stable_diffusion, {}, {"placement": "dedicated"})
    with pytest.raises(RuntimeError, match="own trouble|Connection closed|Timed out"):
        run_ranks(2, update_with_trouble, config)
