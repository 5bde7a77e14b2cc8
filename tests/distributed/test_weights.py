"""Initial weights and checkpoints do not depend on the layout."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_kosmosg.models.initialise import global_name, split_axis
from megatron_kosmosg.parallel import platform
from tests.distributed.layout_case import Case, build
from tests.ranks import run_ranks

EVERYTHING = {"output_head": True, "aligner_parts": ("M", "N")}
LAYOUTS = {
    "tp2": (2, Case(tp=2, **EVERYTHING)),
    "pp2": (2, Case(pp=2, **EVERYTHING)),
    "dp2": (2, Case(**EVERYTHING)),
    "tp2-pp2": (4, Case(tp=2, pp=2, **EVERYTHING)),
}


def initial_weights(case: Case) -> dict:
    """This rank's freshly built parameters and the checkpoint keys with their whole shapes."""
    layout = platform.initialize(case.config())
    model = build(case, layout)
    answer = _weights(model, layout)
    platform.teardown()
    return answer


def save(case: Case, folder: str) -> None:
    """Build, make every weight distinct from its initial value, save."""
    layout = platform.initialize(case.config())
    model = build(case, layout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.25)
    dist_checkpointing.save(model.sharded_state_dict(), folder)
    platform.teardown()


def load(case: Case, folder: str) -> dict:
    """This rank's parameters after loading what `save` wrote."""
    layout = platform.initialize(case.config())
    model = build(case, layout)
    loaded = dist_checkpointing.load(model.sharded_state_dict(), folder)
    model.load_state_dict(loaded, strict=True)
    answer = _weights(model, layout)
    platform.teardown()
    return answer


def _weights(model, layout) -> dict:
    first = model._pieces.first_decoder_layer
    return {
        "tp_rank": layout.tp_rank,
        "weights": {
            global_name(name, first): parameter.detach().numpy()
            for name, parameter in model.named_parameters()
        },
        "keys": {(value.key, value.global_shape) for value in model.sharded_state_dict().values()},
    }


def _whole(results: list[dict]) -> dict[str, np.ndarray]:
    """Every parameter put together; replicas must be equal to the bit."""
    shares: dict[str, dict[int, np.ndarray]] = {}
    for result in results:
        for name, value in result["weights"].items():
            if name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            known = shares.setdefault(name, {}).setdefault(result["tp_rank"], value)
            np.testing.assert_array_equal(known, value, err_msg=name)
    whole = {}
    for name, by_rank in shares.items():
        ordered = [by_rank[rank] for rank in sorted(by_rank)]
        axis = split_axis(name)
        if axis is None:
            for other in ordered[1:]:
                np.testing.assert_array_equal(ordered[0], other, err_msg=name)
        whole[name] = ordered[0] if axis is None else np.concatenate(ordered, axis=axis)
    return whole


@functools.cache
def _reference() -> dict:
    return run_ranks(1, initial_weights, Case(**EVERYTHING))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_initial_weights_and_checkpoint_keys_are_those_of_one_rank(name: str) -> None:
    results = run_ranks(LAYOUTS[name][0], initial_weights, LAYOUTS[name][1])
    whole, wanted = _whole(results), _reference()
    assert whole.keys() == wanted["weights"].keys()
    for parameter, value in wanted["weights"].items():
        np.testing.assert_array_equal(whole[parameter], value, err_msg=parameter)
    assert set().union(*(result["keys"] for result in results)) == wanted["keys"]


@pytest.mark.parametrize("target", ["tp2", "pp2", "dp2", "tp2-pp2"])
def test_checkpoint_of_tp2_loads_into_any_layout(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    run_ranks(2, save, LAYOUTS["tp2"][1], str(folder))
    whole = _whole(run_ranks(LAYOUTS[target][0], load, LAYOUTS[target][1], str(folder)))
    for name, value in _reference()["weights"].items():
        np.testing.assert_array_equal(
            whole[name], value * np.float32(1.5) + np.float32(0.25), err_msg=name
        )


def test_one_stage_reads_its_part_of_anothers_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    run_ranks(2, save, Case(pp=2, output_head=True), str(folder))
    loaded = run_ranks(2, load, Case(tp=2), str(folder))  # neither head nor AlignerNet
    for name, value in _whole(loaded).items():
        np.testing.assert_array_equal(
            value, _reference()["weights"][name] * np.float32(1.5) + np.float32(0.25)
        )


def test_initial_weights_follow_the_recipe() -> None:
    weights = _reference()["weights"]
    depth, width, heads = 3, 32, 4
    gain = math.sqrt(math.log(2 * depth))
    bound = width**-0.5
    for layer in range(depth):
        prefix = f"decoder.layers.{layer}."
        qkv = weights[prefix + "self_attention.linear_qkv.weight"].reshape(heads, 3, -1, width)
        for part, factor in enumerate((1.0, 1.0, gain)):
            _uniform(qkv[:, part], bound * factor)
        _uniform(weights[prefix + "self_attention.linear_proj.weight"], bound * gain)
        _uniform(weights[prefix + "mlp.linear_fc1.weight"], bound * gain)
        _uniform(weights[prefix + "mlp.linear_fc2.weight"], 48**-0.5 * gain)
        assert np.abs(weights[prefix + "mlp.linear_fc2.bias"]).max() <= 48**-0.5 * gain
    first, second = (weights[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 1))
    assert not np.array_equal(first, second)

    encoder_decoder = math.sqrt(math.log(3 * 2))
    gains = {
        "aligner_m.encoder": math.sqrt(math.log(3 * 2) * math.log(2 * 2) / 3),
        "aligner_m.decoder": encoder_decoder,
        "aligner_n.decoder": encoder_decoder,
        "aligner_n.encoder": math.sqrt(math.log(2 * 2)),
    }
    for stack, gain in gains.items():
        _uniform(weights[f"{stack}.layers.0.mlp.linear_fc1.weight"], 20**-0.5 * gain)
        if "decoder" in stack:  # cross-attention has no gain
            for linear in ("linear_q", "linear_kv", "linear_proj"):
                name = f"{stack}.layers.0.cross_attention.{linear}.weight"
                _uniform(weights[name], 20**-0.5)

    xavier = math.sqrt(6 / (2 * width))
    _uniform(weights["resampler.cross_attention.linear_q.weight"], xavier / math.sqrt(2))
    _uniform(weights["resampler.cross_attention.linear_proj.weight"], xavier)
    assert not weights["resampler.cross_attention.linear_proj.bias"].any()
    embedding = weights["embedding.word_embeddings.weight"]
    assert not embedding[1].any() and not embedding[101:].any()
    assert embedding[2:101].std() == pytest.approx(width**-0.5, rel=0.1)
    assert weights["aligner_m.positions.weight"].std() == pytest.approx(1, rel=0.1)
    assert (weights["decoder.final_layernorm.weight"] == 1).all()
    assert (weights["decoder.layers.0.mlp.linear_fc2.sub_norm.weight"] == 1).all()


def _uniform(values: np.ndarray, bound: float) -> None:
    assert np.abs(values).max() <= bound * (1 + 1e-6)
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.12)
