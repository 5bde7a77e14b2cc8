"""The three stages on one CUDA device against the CPU: the same loss and gradients, from every
provider of layers that is installed.

fp32 with TF32 off. The bound, 1e-3 of a gradient's largest entry, allows for other kernels' order
of summation. Without a GPU these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

from megatron_kosmosg.parallel import platform
from tests.support.ranks import run_ranks
from tests.support.shares import whole
from tests.support.stage_gradients import stage_gradients
from tests.support.tiny_models import tiny_config, write_stable_diffusion

pytestmark = pytest.mark.gpu


def gradients_on_cpu(config, monkeypatch):
    with monkeypatch.context() as changed:
        changed.setenv("CUDA_VISIBLE_DEVICES", "")  # before the rank asks CUDA for the first time
        ((loss, gradients),) = run_ranks(1, stage_gradients, config, start_method="spawn")
    return loss, gradients


def gradients_on_gpu(config, provider):
    if provider == "local":  # takes TransformerEngine's place where that is installed
        sys.modules["transformer_engine.pytorch"] = None
    assert platform.transformer_impl() == provider
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return stage_gradients(config)


@pytest.mark.parametrize("provider", ["local", "transformer_engine"])
@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_gpu_gives_the_losses_and_gradients_of_the_cpu(stage, provider, tmp_path, monkeypatch):
    if provider != "local" and importlib.util.find_spec(provider) is None:
        pytest.skip(f"{provider} is not installed, or does not work (kosmosg doctor)")
    config = tiny_config(stage, write_stable_diffusion(tmp_path / "sd"), tmp_path)
    expected_loss, expected = gradients_on_cpu(config, monkeypatch)
    # TransformerEngine asks cuBLAS for TF32 by itself, whatever torch's switches say.
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    parts = (config, provider)
    ((loss, found),) = run_ranks(1, gradients_on_gpu, *parts, start_method="spawn")
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    expected, found = whole([expected], tolerance=0), whole([found], tolerance=0)
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for key, gradient in expected.items():
        scale = max(np.abs(gradient).max(), 1e-3 * largest)
        assert np.abs(found[key] - gradient).max() <= 1e-3 * scale, key
