"""The CPU shim: what it covers, and that nobody else notices it."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path
from platform import libc_ver

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

THIRD_ROUND = """
import resource
import torch
from megatron_kosmosg.parallel import cpu_shim

cpu_shim._keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(16)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Prints how many pages were asked for when 64 MiB were allocated for the third time."""


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
    # So it does where Megatron-Core saw TransformerEngine on a machine that shows no GPU.
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    with pytest.raises(RuntimeError, match=r"import megatron_kosmosg before megatron\.core"):
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


class _Group:
    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def size(self) -> int:
        return self._ranks


def test_a_rank_alone_copies_no_buffer() -> None:
    """What gloo would make of a buffer is the buffer; every other call goes through."""
    made = []

    def collective(output, given, *, group, async_op) -> str:
        made.append((group.size(), async_op))
        return "work"

    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        run = functools.partial(getattr(buffers, name).func, collective)
        whole = torch.arange(4.0)
        assert run(whole, whole[:], group=_Group(1), async_op=True) is None and not made
        assert run(whole, torch.ones(4), group=_Group(1), async_op=False) == "work"
        assert run(whole, whole[:2], group=_Group(2), async_op=True) == "work"
        assert made == [(1, False), (2, True)]
        made.clear()


@pytest.mark.skipif("MALLOC_TRIM_THRESHOLD_" in os.environ, reason="the environment decides")
@pytest.mark.skipif(libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_stays_for_the_next_update() -> None:
    """In a process of its own: what other tests left in the heap would decide."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THIRD_ROUND], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 2**22 // resource.getpagesize() // 2
