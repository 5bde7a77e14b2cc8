"""Initial weights and checkpoints do not depend on the layout.

tests/unit/test_models_initialise.py shows what the initial weights are.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_kosmosg.parallel import platform
from tests.support.layout_case import Case, build
from tests.support.ranks import run_ranks
from tests.support.shares import parameters, whole

EVERYTHING = {"output_head": True, "aligner_parts": ("M", "N")}
LAYOUTS = {
    "tp2": (2, Case(tp=2, **EVERYTHING)),
    "pp2": (2, Case(pp=2, **EVERYTHING)),
    "dp2": (2, Case(**EVERYTHING)),
    "tp2-pp2": (4, Case(tp=2, pp=2, **EVERYTHING)),
}


def initial_weights(case: Case) -> dict:
    """This rank's freshly built parameters and the checkpoint keys with their whole shapes."""
    context = platform.initialize(case.config())
    model = build(case, context)
    answer = _weights(model, context)
    platform.teardown()
    return answer


def save(case: Case, folder: str) -> None:
    """Build, make every weight distinct from its initial value, save."""
    context = platform.initialize(case.config())
    model = build(case, context)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.25)
    dist_checkpointing.save(model.sharded_state_dict(), folder)
    platform.teardown()


def load(case: Case, folder: str) -> dict:
    """This rank's parameters after loading what `save` wrote."""
    context = platform.initialize(case.config())
    model = build(case, context)
    loaded = dist_checkpointing.load(model.sharded_state_dict(), folder)
    model.load_state_dict(loaded, strict=True)
    answer = _weights(model, context)
    platform.teardown()
    return answer


def _weights(model, context) -> dict:
    return {
        "weights": parameters(model, context),
        "keys": {(value.key, value.global_shape) for value in model.sharded_state_dict().values()},
    }


def _whole(results: list[dict]) -> dict[str, np.ndarray]:
    """Every parameter put together; replicas must be equal to the bit."""
    return whole([result["weights"] for result in results], tolerance=0)


@functools.cache
def _on_one_rank() -> tuple[dict[str, np.ndarray], set]:
    """(initial weights, checkpoint keys) without any parallelism."""
    (result,) = run_ranks(1, initial_weights, Case(**EVERYTHING))
    return _whole([result]), result["keys"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_initial_weights_and_checkpoint_keys_are_those_of_one_rank(name: str) -> None:
    results = run_ranks(LAYOUTS[name][0], initial_weights, LAYOUTS[name][1])
    found, (wanted, keys) = _whole(results), _on_one_rank()
    assert found.keys() == wanted.keys()
    for parameter, value in wanted.items():
        np.testing.assert_array_equal(found[parameter], value, err_msg=parameter)
    assert set().union(*(result["keys"] for result in results)) == keys


@pytest.mark.parametrize("target", ["tp2", "pp2", "dp2", "tp2-pp2"])
def test_checkpoint_of_tp2_loads_into_any_layout(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    run_ranks(2, save, LAYOUTS["tp2"][1], str(folder))
    loaded = _whole(run_ranks(LAYOUTS[target][0], load, LAYOUTS[target][1], str(folder)))
    for name, value in _on_one_rank()[0].items():
        np.testing.assert_array_equal(
            loaded[name], value * np.float32(1.5) + np.float32(0.25), err_msg=name
        )


def test_one_stage_reads_its_part_of_anothers_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    run_ranks(2, save, Case(pp=2, output_head=True), str(folder))
    loaded = run_ranks(2, load, Case(tp=2), str(folder))  # neither head nor AlignerNet
    for name, value in _whole(loaded).items():
        np.testing.assert_array_equal(
            value, _on_one_rank()[0][name] * np.float32(1.5) + np.float32(0.25)
        )
