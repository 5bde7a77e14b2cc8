"""The stand-in for the fused AdamW: the numbers of torch's AdamW, which is another code on a CPU,
in the fused optimizers' state layout."""

from __future__ import annotations

import importlib.util

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch

from megatron_kosmosg.parallel import fused_adam
from megatron_kosmosg.parallel.fused_adam import FusedLayoutAdamW

SETTINGS = {"lr": 0.05, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


def _train(optimizer_class, num_steps: int) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = optimizer_class(parameters, **SETTINGS)
    for step in range(num_steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.cos(parameter.detach() * (step + 1)) * (number + 1)
        optimizer.step()
    return [p.detach() for p in parameters], optimizer


def test_steps_are_those_of_torch() -> None:
    ours, _ = _train(FusedLayoutAdamW, 7)
    theirs, _ = _train(torch.optim.AdamW, 7)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-7)


def test_step_is_in_the_group_and_state_has_two_moments() -> None:
    _, optimizer = _train(FusedLayoutAdamW, 3)
    assert optimizer.param_groups[0]["step"] == 3
    for state in optimizer.state.values():
        assert state.keys() == {"exp_avg", "exp_avg_sq"}


def test_parameters_without_gradient_are_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedLayoutAdamW([parameter], **SETTINGS)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2)) and not optimizer.state


def test_what_megatron_hands_over_is_taken_and_a_cuda_graph_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    FusedLayoutAdamW([parameter], **SETTINGS, adam_w_mode=True, capturable=False)
    with pytest.raises(ValueError, match="capturable"):
        FusedLayoutAdamW([parameter], **SETTINGS, capturable=True)


def test_megatron_takes_it_where_nothing_fused_is_installed() -> None:
    if importlib.util.find_spec("transformer_engine") or importlib.util.find_spec("apex"):
        pytest.skip("a fused optimizer is installed")
    assert fused_adam.install() == "own"
    assert fused_adam.install() == "own"
    assert megatron_optimizer.Adam is FusedLayoutAdamW
    assert not megatron_optimizer.USING_PYTORCH_OPTIMIZER
