"""The CPU shim: what it covers, and that nobody else notices it."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest
import torch

from megatron_kosmosg.parallel import cpu_shim, cpu_shim_selftest, platform
from tests.support.shim_sites import SITES

HARMLESS = {"the real is_available"}
"""Without a GPU torch answers these as it should."""

# Modules that this project runs and that name CUDA. A new one must be looked at before it is added.
USED = (
    "distributed.param_and_grad_buffer",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.mappings",
    "timers",
    "utils",
)


@pytest.fixture(autouse=True)
def on_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("the shim is for machines without a GPU")
    platform.prepare_megatron(torch.device("cpu"))


def test_self_test_asks_whatever_training_asks() -> None:
    """On either release; a trace of all stages found it (tests/support/shim_sites.py)."""
    recorded = {
        (site.split(":")[0], site.split(" asks ")[1])
        for sites in json.loads(SITES.read_text()).values()
        for site in sites
    }
    real = {question for _, question in recorded if question.startswith("the real")}
    assert not real - HARMLESS, "training reaches CUDA where the shim does not stand"
    asked = {(m, question) for m, found in cpu_shim_selftest.SITES.items() for question in found}
    assert asked == {site for site in recorded if site[1] not in real}
    names = cpu_shim_selftest.run_self_test()
    assert len(names) == len(asked) + len(cpu_shim_selftest.CHECKS)


def test_self_test_fails_loudly_when_a_place_moves(monkeypatch) -> None:
    from megatron.core.pipeline_parallel import schedules

    monkeypatch.setattr(schedules, "torch", torch)
    with pytest.raises(RuntimeError, match="pipeline_parallel.schedules: zeros"):
        cpu_shim_selftest.run_self_test()


@pytest.mark.parametrize("name", USED)
def test_every_cuda_literal_is_in_a_creation_function_that_is_covered(name: str) -> None:
    module = importlib.import_module(f"megatron.core.{name}")
    assert module.torch is not torch, "this module still sees the real torch"
    for call in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if not isinstance(call, ast.Call):
            continue
        for keyword in call.keywords:
            value = keyword.value
            if keyword.arg == "device" and getattr(value, "value", None) == "cuda":
                function = ast.unparse(call.func)
                # Fully sharded communication buffers on NVLink; needs CUDA anyway.
                if function == "symm_mem.empty":
                    continue
                assert function.removeprefix("torch.") in cpu_shim.CREATION_FUNCTIONS, function


def test_code_outside_megatron_sees_the_real_torch() -> None:
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros.__module__ != cpu_shim.__name__
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()


def test_installing_twice_changes_nothing() -> None:
    before = torch.Tensor.type
    cpu_shim.install()
    assert torch.Tensor.type is before
    assert cpu_shim_selftest.run_self_test()
