"""A model that trains in half precision never holds its float32 weights at once, and starts at the
numbers of one that did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.platform import torch_dtype
from megatron_kosmosg.training.wrapping import parameters_in
from tests.support.layout_case import Case, build
from tests.support.measured_memory import StorageTracker
from tests.support.ranks import run_ranks


def is_same(cast: KosmosG, half: KosmosG) -> bool:
    """In every bit of the weights, and in what Megatron-Core reads beside them."""
    pairs = list(zip(cast.named_parameters(), half.named_parameters(), strict=True))
    return all(
        old_name == new_name and torch.equal(old, new) and vars(old) == vars(new)
        for (old_name, old), (new_name, new) in pairs
    )


def built_both_ways(case: Case, folder: Path) -> dict:
    """Built and cast, against built in the precision: weights, peak bytes, state of the generator
    that dropout goes on with; and both filled from a checkpoint in float32."""
    context = platform.initialize(case.config())
    dtype, found, models = torch_dtype(case.precision), {}, {}
    with StorageTracker() as tracker:
        torch.manual_seed(1)
        full = build(case, context)
    found["full peak"], found["full state"] = tracker.peak, torch.get_rng_state().tolist()
    with StorageTracker() as tracker, parameters_in(case.precision):
        torch.manual_seed(1)
        models["new"] = build(case, context)
    found["peak"], found["state"] = tracker.peak, torch.get_rng_state().tolist()
    found["largest"] = max(p.numel() for p in full.parameters())
    found["numel"] = sum(p.numel() for p in full.parameters())
    dist_checkpointing.save(full.sharded_state_dict(), str(folder))
    with parameters_in(case.precision):
        models["loaded"] = build(case, context)
    for parameter in models["loaded"].parameters():
        parameter.data.fill_(0)
    state = dist_checkpointing.load(models["loaded"].sharded_state_dict(), str(folder))
    models["loaded"].load_state_dict(state, strict=True)
    cast = full.to(dtype)
    found |= {name: is_same(cast, model) for name, model in models.items()}
    platform.teardown()
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_are_those_of_a_cast_without_its_peak(tmp_path, precision):
    case = Case(output_head=True, aligner_parts=("M", "N"), precision=precision)
    (found,) = run_ranks(1, built_both_ways, case, tmp_path)
    assert found["new"] and found["loaded"]
    assert found["state"] == found["full state"]
    # A parameter is float32 while it is made, once as it is drawn and once as it is kept.
    assert found["peak"] <= 2 * found["numel"] + 3 * 4 * found["largest"] < found["full peak"]


def test_no_module_made_afterwards_is_cast():
    with pytest.raises(ZeroDivisionError), parameters_in("bf16"):
        assert torch.nn.Linear(2, 2).weight.dtype is torch.bfloat16
        _ = 1 / 0
    assert torch.nn.Linear(2, 2).weight.dtype is torch.float32
