"""The bodies of the GPU tests run in CI, with the CPU in the GPU's place, so that they cannot rot.

What of them runs on the device runs on the fake one as well:
`test_where_a_gpu_is_visible.py::test_the_code_of_the_gpu_tests_runs_on_the_device`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_kosmosg.data.images import ImageDecoder
from tests.support.image_cases import BACKENDS
from tests.support.stage_gradients import stage_gradients

FOLDER = Path(__file__).parents[1] / "gpu"


def gpu_tests() -> Iterator[tuple[str, str]]:
    """(module, function), also of those that are written later."""
    for path in sorted(FOLDER.glob("test_*.py")):
        module = importlib.import_module(f"tests.gpu.{path.stem}")
        for name, value in vars(module).items():
            if name.startswith("test_") and inspect.isfunction(value):
                yield module.__name__, name


def cases(function: Callable) -> list[dict]:
    """The arguments that its parametrize marks give."""
    each = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            each.append([{mark.args[0]: value} for value in mark.args[1]])
    return [functools.reduce(dict.__or__, one, {}) for one in itertools.product(*each)]


@functools.cache
def decoder_on_cpu(backend: str, device_id: int | None = None) -> ImageDecoder:
    return ImageDecoder(backend)


def gradients_without_gpu(config, provider):
    return stage_gradients(config)


@pytest.mark.parametrize(("module", "name"), list(gpu_tests()))
def test_the_body_of_a_gpu_test_passes_on_the_cpu(module, name, monkeypatch, tmp_path):
    loaded = importlib.import_module(module)
    if hasattr(loaded, "ImageDecoder"):
        if "dali" not in BACKENDS:
            pytest.skip("nvidia-dali is not installed")
        monkeypatch.setattr(loaded, "ImageDecoder", decoder_on_cpu)
    if hasattr(loaded, "gradients_on_gpu"):
        monkeypatch.setattr(loaded, "gradients_on_gpu", gradients_without_gpu)
    function = getattr(loaded, name)
    todo = cases(function)
    if "tmp_path" in inspect.signature(function).parameters:  # it trains: one case
        todo = [todo[0] | {"tmp_path": tmp_path, "monkeypatch": monkeypatch}]
    for case in todo:
        function(**case)
    assert todo
