"""Checks that the CPU shim (cpu_shim.py) works at every place of Megatron-Core that training needs.

The shim gives each module of Megatron-Core its own view of torch, so one place can be right and
another wrong. Short expressions (`_QUESTIONS`) are therefore evaluated inside the modules' own
namespaces (`SITES`), where the name `torch` means what it means to the module; and whole parts of
Megatron-Core are run (`CHECKS`). A megatron-core upgrade that moves a place stops the run at its
start with the name of the place, instead of an obscure CUDA error (or none) later.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable

import megatron.core
import torch


def run_self_test() -> list[str]:
    """The names of the places checked. Raises RuntimeError naming the first that fails."""
    checks = CHECKS | {
        f"{module}: {question}": functools.partial(_answers, module, question)
        for module, questions in SITES.items()
        for question in questions
    }
    state = torch.get_rng_state()
    try:
        for name, check in checks.items():
            try:
                fits = check()
            except Exception as error:
                raise RuntimeError(_message(name, repr(error))) from error
            if not fits:
                raise RuntimeError(_message(name, "wrong answer"))
    finally:
        torch.set_rng_state(state)
    return list(checks)


def _message(name: str, problem: str) -> str:
    repair = "Install the megatron-core version of constraints.txt"
    if sys.modules.get("transformer_engine") is not None:
        repair = (
            "TransformerEngine, which needs a GPU, is in use: import megatron_kosmosg before "
            "megatron.core, so that it is left aside where there is none"
        )
    return (
        f"The CPU shim does not fit megatron-core {megatron.core.__version__} at '{name}': "
        f"{problem}. {repair}."
    )


SITES: dict[str, tuple[str, ...]] = {
    "dist_checkpointing.exchange_utils": ("Tensor.cuda", "empty_like"),
    "dist_checkpointing.strategies.fully_parallel": ("synchronize",),
    "dist_checkpointing.strategies.state_dict_saver": ("current_device",),
    "distributed.param_and_grad_buffer": ("current_device", "current_stream"),
    "models.common.language_module.language_module": ("Tensor.cuda",),
    "optimizer.clip_grads": ("Tensor.type", "zeros"),
    "optimizer.distrib_optimizer": ("Tensor.cuda", "Tensor.type", "current_device"),
    "optimizer.grad_scaler": ("Tensor.cuda", "current_device", "tensor"),
    "optimizer.optimizer": ("tensor",),
    "pipeline_parallel.p2p_communication": ("current_device",),
    "pipeline_parallel.schedules": ("zeros",),
    "tensor_parallel.layers": ("current_device",),
    "tensor_parallel.mappings": ("current_device",),
    "tensor_parallel.random": ("get_rng_state", "manual_seed"),
    "timers": ("synchronize",),
    "utils": ("current_device",),
}
"""What training asks each module of megatron.core for, on any supported release, as the trace of
`tests/support/shim_sites.py` found it."""

_QUESTIONS = {
    "current_device": "torch.cuda.current_device() == torch.device('cpu')",
    "current_stream": "torch.cuda.current_stream().wait_stream is not None",
    "synchronize": "torch.cuda.synchronize() is None",
    "get_rng_state": "torch.equal(torch.cuda.get_rng_state(), torch.cuda.get_rng_state())",
    "manual_seed": "torch.cuda.manual_seed(1) is None",
    "empty_like": "torch.empty_like(torch.ones(1), device='cuda').is_cpu",
    "tensor": "torch.tensor([1.0], device='cuda').is_cpu",
    "zeros": "torch.zeros(1, device='cuda').is_cpu",
    "Tensor.cuda": "torch.ones(1).cuda().is_cpu",
    "Tensor.type": "torch.ones(1).type() == 'torch.cuda.FloatTensor'",
}
"""Expressions as the code of a module would write them, true where the shim answers there. They are
texts because a function would see the `torch` of this file."""


def _answers(module: str, question: str) -> bool:
    """Whether the question's expression is true inside the module megatron.core.MODULE."""
    scope = vars(importlib.import_module(f"megatron.core.{module}"))
    return bool(eval(_QUESTIONS[question], scope))


def _memory_buffer() -> bool:
    from megatron.core.utils import GlobalMemoryBuffer

    return GlobalMemoryBuffer().get_tensor([2, 2], torch.float32, "self-test").is_cpu


def _grad_scaler() -> bool:
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    scaler = DynamicGradScaler(8.0, 1.0, 2.0, 0.5, 10, 1)
    scaler.load_state_dict(scaler.state_dict())  # calls Tensor.cuda
    return scaler.scale.is_cpu


def _clip_by_norm() -> bool:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    return torch.allclose(parameter.grad, torch.tensor([0.6, 0.8]))


def _tracker() -> bool:
    """Whether a fork of the tracker has random numbers of its own seed, and leaves those outside
    as they would have been."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("self-test", 1234)
    torch.manual_seed(1)
    outside = torch.rand(3)
    torch.manual_seed(1)
    with tracker.fork("self-test"):
        inside = torch.rand(3)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(1234))
    return torch.equal(inside, expected) and torch.equal(torch.rand(3), outside)


def _recompute() -> bool:
    """Whether a recomputed forward pass draws the same dropout as the first, whose random state
    Megatron-Core puts back through the shim."""
    from megatron.core.tensor_parallel import random

    seen = []

    def dropped(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.nn.functional.dropout(x, 0.5))
        return seen[-1]

    x = torch.ones(64, requires_grad=True)
    random.checkpoint(dropped, False, x).sum().backward()
    if len(seen) != 2 or x.grad is None:
        return False
    return torch.equal(*seen) and torch.equal(x.grad, seen[0])


def _timers() -> bool:
    from megatron.core.timers import Timers

    timer = Timers(log_level=0, log_option="max")("self-test", log_level=0)
    timer.start()
    timer.stop()
    return timer.elapsed() >= 0


CHECKS: dict[str, Callable[[], bool]] = {
    "utils.GlobalMemoryBuffer": _memory_buffer,
    "optimizer.grad_scaler": _grad_scaler,
    "optimizer.clip_grads: clipping": _clip_by_norm,
    "tensor_parallel.random: tracker": _tracker,
    "tensor_parallel.random: recompute": _recompute,
    "timers": _timers,
}
