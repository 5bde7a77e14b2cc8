"""LayerNorm over features that are split over ranks equals torch's on one rank."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_kosmosg.config.schema import ParallelConfig, RunConfig
from megatron_kosmosg.models.norms import ShardedLayerNorm
from megatron_kosmosg.parallel import platform
from tests.support.ranks import run_ranks

WIDTH = 24


def _inputs(mean: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 2, WIDTH, generator=generator) + mean
    weight, bias = torch.randn(2, WIDTH, generator=generator)
    return x, weight, bias, torch.randn(5, 2, WIDTH, generator=generator)


def sharded(tp: int, mean: float, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Output and gradients of this rank's share."""
    config = RunConfig(
        stage="pretrain",
        parallel=ParallelConfig(tensor_model_parallel_size=tp, timeout_seconds=60),
    )
    context = platform.initialize(config)
    x, weight, bias, grad = (
        t.chunk(tp, dim=-1)[context.tp_rank].contiguous() for t in _inputs(mean)
    )
    sizes = SimpleNamespace(layernorm_epsilon=1e-5, params_dtype=dtype)
    norm = ShardedLayerNorm(sizes, WIDTH, context.tp_group)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    x = x.to(dtype).requires_grad_()
    y = norm(x)
    assert y.dtype == dtype
    y.backward(grad.to(dtype))
    assert norm.weight.tensor_model_parallel
    platform.teardown()
    shares = {"y": y, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {name: value.detach().float().numpy() for name, value in shares.items()}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("mean", "dtype", "tolerance"),
    [(0.0, torch.float32, 2e-6), (30.0, torch.float32, 2e-5), (0.0, torch.bfloat16, 2e-2)],
)
def test_sharded_norm_is_layer_norm(
    tp: int, mean: float, dtype: torch.dtype, tolerance: float
) -> None:
    x, weight, bias, grad = (t.to(dtype) for t in _inputs(mean))
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    y = F.layer_norm(x, (WIDTH,), weight, bias, 1e-5)
    y.backward(grad)
    expected = {"y": y, "x": x.grad, "weight": weight.grad, "bias": bias.grad}
    shares = run_ranks(tp, sharded, tp, mean, dtype)
    for name, value in expected.items():
        got = np.concatenate([share[name] for share in shares], axis=-1)
        value = value.detach().float().numpy()
        assert np.abs(got - value).max() / np.abs(value).max() < tolerance, name
