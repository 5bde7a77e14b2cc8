"""Optimizers that Megatron-Core has for a GPU alone, on the CPU: its own code, with another answer
to what lies on the GPU, and a class with the interface of TransformerEngine's FusedAdam."""

from __future__ import annotations

import inspect
import sys
import textwrap
import types
from contextlib import nullcontext
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer, hybrid_optimizer

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel.fused_adam import fused_update
from tests.support.training_runs import train


def train_offloaded(config: RunConfig) -> None:
    """Trains with every parameter taken for one on a GPU."""
    _pretend_that_parameters_are_on_a_gpu()
    train(config)


def train_with_fused_adam(config: RunConfig) -> None:
    """Trains with `LikeFusedAdam`."""
    module: Any = types.ModuleType("transformer_engine.pytorch.optimizers")
    module.FusedAdam = LikeFusedAdam
    package: Any = types.ModuleType("transformer_engine")
    package.__version__ = "2.11.0"
    sys.modules["transformer_engine"] = package
    sys.modules["transformer_engine.pytorch"] = types.ModuleType("transformer_engine.pytorch")
    sys.modules[module.__name__] = module
    megatron_optimizer.Adam = distrib_optimizer.Adam = LikeFusedAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    train(config)


def _pretend_that_parameters_are_on_a_gpu() -> None:
    text = textwrap.dedent(inspect.getsource(HybridDeviceOptimizer._get_sub_optimizer_param_groups))
    answers = {
        "for param in params if param.is_cuda": "for param in params",
        "offload_threshold and param.is_cuda": "offload_threshold",
        ".clone().cpu().pin_memory()": ".clone()",
        "if param.is_cuda:": "if not cpu_copy:",
    }
    for asked, answer in answers.items():
        assert text.count(asked) == 1, f"Megatron-Core asks otherwise: {asked}"
        text = text.replace(asked, answer)
    names: dict[str, Any] = {}
    exec(text, vars(hybrid_optimizer), names)
    HybridDeviceOptimizer._get_sub_optimizer_param_groups = names["_get_sub_optimizer_param_groups"]
    HybridDeviceOptimizer._move_new_state_to_right_device = lambda self: None
    view: Any = types.ModuleType("torch")
    vars(view).update(vars(torch))
    view.cuda = types.SimpleNamespace(
        current_stream=_Stream, Stream=_Stream, stream=lambda stream: nullcontext()
    )
    view.empty = lambda *shape, pin_memory, **named: torch.empty(*shape, **named)
    vars(hybrid_optimizer)["torch"] = view


class _Stream:
    """A stream whose work is done when it is asked for; also its own event."""

    def wait_stream(self, other: _Stream) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def wait(self, stream: _Stream) -> None: ...

    def synchronize(self) -> None: ...


class LikeFusedAdam(torch.optim.Optimizer):
    """AdamW with float32 weights of its own and moments of two dtypes, which it updates in float32;
    gradients come as `decoupled_grad`, and a state goes in and out as float32."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        adam_w_mode: bool,
        master_weights: bool,
        master_weight_dtype: torch.dtype,
        exp_avg_dtype: torch.dtype,
        exp_avg_sq_dtype: torch.dtype,
        use_decoupled_grad: bool,
        store_param_remainders: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and master_weights and use_decoupled_grad
        assert not store_param_remainders and not capturable
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.dtypes = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        for name, dtype in self.dtypes.items():
            value = param.detach() if name == "master_param" else torch.zeros_like(param)
            self.state[param][name] = value.to(dtype, copy=True)

    def get_unscaled_state(self, param: torch.Tensor, state_name: str) -> torch.Tensor:
        return self.state[param][state_name].float()

    def set_scaled_state(self, param: torch.Tensor, state_name: str, value: torch.Tensor) -> None:
        assert value.dtype == torch.float32
        self.state[param][state_name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        found["state"] = {
            number: {name: value.float() for name, value in state.items()}
            for number, state in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # in the dtype of the parameters
        parameters = [each for group in self.param_groups for each in group["params"]]
        for number, state in state_dict["state"].items():
            self.state[parameters[number]] = {
                name: value.to(self.dtypes[name], copy=True) for name, value in state.items()
            }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            found = [each for each in group["params"] if each.decoupled_grad is not None]
            if not found:
                continue
            group["step"] = group.get("step", 0) + 1
            names = ("master_param", "exp_avg", "exp_avg_sq")
            values = {
                name: [self.get_unscaled_state(each, name) for each in found] for name in names
            }
            for weight, each in zip(values["master_param"], found, strict=True):
                weight.grad = each.decoupled_grad.float()
            fused_update(group, *values.values())
            for name, after in values.items():
                for each, value in zip(found, after, strict=True):
                    self.state[each][name].copy_(value)
            for each, value in zip(found, values["master_param"], strict=True):
                value.grad = None
                each.copy_(value)
