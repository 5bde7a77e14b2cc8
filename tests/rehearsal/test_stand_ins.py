"""The fake device counts what small programs do, and refuses what a device or NCCL would."""

from __future__ import annotations

import pytest

from megatron_kosmosg.rehearsal.case import RehearsalCase

DO = "tests.support.fake_device_programs:"


@pytest.fixture(scope="module")
def phases(rehearse) -> dict:
    return rehearse.answer(RehearsalCase(None, (), 0, 0, do=f"{DO}count"))["phases"]


def test_launches_are_counted_and_views_are_not(phases):
    phase = phases["kernels"]
    assert phase["kernels"] == {"zeros": 1, "mm": 1, "add_": 1, "_foreach_mul_": 1, "div": 1}
    assert phase["flops"] == 2 * 4 * 8 * 16
    assert sum(phase["without_effect"].values()) == 1


def test_work_on_nothing_and_on_the_host_launches_nothing(phases):
    assert phases["nothing"]["kernels"] == {}
    ((product, count),) = phases["nothing"]["empty"].items()
    assert product.startswith("mm at ") and count == 1


def test_every_way_to_wait_is_seen(phases):
    kinds = {wait.partition(" at ")[0]: count for wait, count in phases["waits"]["waits"].items()}
    assert kinds == {
        "item()": 1,
        "tolist()": 1,
        "copy cuda -> cpu": 1,
        "copy cpu -> cuda": 1,
        "torch.cuda.synchronize": 1,
        "cuda.Event.synchronize": 1,
    }


def test_only_copies_from_pageable_memory_are_held_against_a_program(phases):
    assert sum(phases["copies"]["pageable"].values()) == 40
    assert phases["copies"]["uploaded"] == 80
    assert phases["copies"]["waits"] == {}


def test_memory_is_free_when_a_tensor_is_gone(phases):
    assert phases["memory"]["peak"] - phases["setup"]["peak"] == 4096
    assert phases["memory"]["largest"]["bytes"] == 4096


def test_a_wait_in_a_backward_pass_is_seen(phases):
    (wait,) = phases["backward"]["waits"]
    assert wait.startswith("masked_select, backward of masked_scatter at ")


def test_attention_takes_the_kernel_that_the_gpu_would(phases):
    calls = {kernel: list(shapes) for kernel, shapes in phases["attention"]["attention"].items()}
    assert calls == {
        "flash": ["(2, 4, 16, 64) x 16, bfloat16, causal"],
        "efficient": ["(2, 4, 16, 64) x 16, bfloat16, mask (2, 1, 1, 16)"],
        "matrix": ["(2, 4, 16, 63) x 16, bfloat16, mask (2, 1, 1, 16)"],
    }


@pytest.mark.parametrize(
    ("wrong", "output"),
    [
        ("device", "device"),
        ("dtype", "dtype"),
        ("shape", "[4, 4] X [3, 4]"),
        ("collective on the host", "NCCL has no tensors on cpu"),
        ("collective of a transposed tensor", "contiguous"),
        ("gather of another size", "from (4,) to (4,)"),
        ("gloo", "backend gloo"),
    ],
)
def test_what_a_gpu_refuses_is_an_error(rehearse, wrong, output):
    errors = rehearse.answer(RehearsalCase(None, (), 0, 0, do=f"{DO}fail"))["errors"]
    assert output in errors[wrong], errors[wrong]
