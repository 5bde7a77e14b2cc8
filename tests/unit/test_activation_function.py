"""GELU of the layers' own dtype against the authors', which is computed on a float32 copy."""

from __future__ import annotations

import pytest
import torch

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.mcore_configs import aligner_config, decoder_config


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config("toy_instruct", ["training.precision=bf16"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stack", ["decoder", "aligner"])
def test_output_and_gradient_are_those_of_a_float32_copy_to_the_bit(config, stack, dtype):
    made = decoder_config(config, []) if stack == "decoder" else aligner_config(config)
    rng = torch.Generator().manual_seed(0)
    # Odd, so that the kernel's loop over single numbers has some, too.
    values, gradient = (torch.randn(100_003, generator=rng) for _ in range(2))
    x = (4 * values).to(dtype).requires_grad_()
    copied = x.detach().clone().requires_grad_()
    output = made.activation_func(x)
    expected = torch.nn.functional.gelu(copied.float()).to(dtype)
    assert output.dtype == dtype and torch.equal(output, expected)
    output.backward(gradient.to(dtype))
    expected.backward(gradient.to(dtype))
    assert torch.equal(x.grad, copied.grad)
