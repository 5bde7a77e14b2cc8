"""Lets Megatron-Core run on a CPU: its modules see a `torch` in which "cuda" means the CPU.

megatron-core hard-codes CUDA in its schedules, mappings, optimizers and RNG tracker. Instead
of changing torch for everybody, each `megatron.core` module gets a view of torch in which creation
functions map a CUDA device to the CPU and `torch.cuda` answers for the CPU. Everything else in the
process sees the real torch, and no call costs anything extra. Only two Tensor methods (`cuda`,
`type`) are replaced on the class; they answer differently to callers inside Megatron-Core alone.

Beside that, what only a CPU would pay for is left out: gloo's copies of a buffer that one rank has
for itself, and memory that goes to the kernel and comes back, page by page, in every update.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

# Modules that are imported before the views are handed out; the rest comes with them.
_MEGATRON_MODULES = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.serialization",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.models.common.language_module.language_module",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.timers",
    "megatron.core.transformer.transformer_layer",
)
CREATION_FUNCTIONS = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_CPU = torch.device("cpu")
_KEPT_MEMORY = {-1: 2**30, -3: 2**25}
"""glibc's M_TRIM_THRESHOLD (bytes free at the end of the heap before they are given back) and
M_MMAP_THRESHOLD (size of an allocation that has pages of its own; this is the largest)."""


def install() -> None:
    """Give every loaded `megatron.core` module the CPU view of torch. Safe to call again."""
    for name in _MEGATRON_MODULES:
        importlib.import_module(name)
    view = _cpu_view()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            vars(module)["torch"] = view
    _patch_random(view)
    _skip_collectives_of_one_rank()
    _keep_freed_memory()
    for method, answer in (("cuda", _cuda_for_megatron), ("type", _type_for_megatron)):
        original = getattr(torch.Tensor, method)
        if not isinstance(original, types.FunctionType):  # torch's own is a C function
            setattr(torch.Tensor, method, answer(original))


def _cpu_view() -> types.ModuleType:
    overrides = {name: _on_cpu(getattr(torch, name)) for name in CREATION_FUNCTIONS}
    cuda = _view_of(torch.cuda, **{answer.__name__: answer for answer in CUDA_FUNCTIONS})
    return _view_of(torch, cuda=cuda, **overrides)


def current_device() -> torch.device:
    """Stands for torch.cuda.current_device: the CPU. The functions below stand for their namesakes
    likewise."""
    return _CPU


def synchronize(device: Any = None) -> None:
    """Returns at once: on a CPU there is nothing to wait for."""


def get_rng_state(device: Any = None) -> torch.Tensor:
    """The state of the CPU's generator, which is the only one."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    """Sets the state of the CPU's generator."""
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seeds the CPU's generator."""
    torch.default_generator.manual_seed(seed)


def current_stream(device: Any = None) -> torch.cpu.Stream:
    """The only one. 0.19 asks for it before every reduction, should a CUDA graph be in flight."""
    return torch.cpu.current_stream()


CUDA_FUNCTIONS = (
    current_device, current_stream, synchronize, get_rng_state, set_rng_state, manual_seed,
)  # fmt: skip


def _view_of(module: types.ModuleType, **overrides: Any) -> types.ModuleType:
    view = types.ModuleType(module.__name__)
    vars(view).update(vars(module))
    vars(view).update(overrides)
    view.__getattr__ = lambda name: getattr(module, name)  # what torch imports lazily
    return view


def _on_cpu(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create_on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        return create(*args, **kwargs)

    return create_on_cpu


def _patch_random(view: types.ModuleType) -> None:
    """The CPU generator plays the CUDA generator in the tracker and in activation recompute.

    Both also save "the CPU's state" beside it: there is no second generator, so that one is a
    constant. (The tracker warns whenever it changes.)
    """
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    constant = torch.zeros(1, dtype=torch.uint8)
    vars(random).update(
        torch=_view_of(view, get_rng_state=lambda: constant, set_rng_state=lambda state: None),
        _get_cuda_rng_state=lambda device="cuda", clone=False, graph_safe=False: (
            torch.get_rng_state()
        ),
        _set_cuda_rng_state=lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(
            new_state
        ),
    )


def _skip_collectives_of_one_rank() -> None:
    """Makes collectives of gradient and parameter buffers nothing where their group has one rank.

    Their output is their input then, which NCCL knows; gloo makes three copies an update.
    """
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        collective = getattr(buffers, name)
        if not isinstance(collective, functools.partial):
            setattr(buffers, name, functools.partial(_unless_alone, collective))


def _unless_alone(
    collective: Callable[..., Any],
    output: torch.Tensor,
    source: torch.Tensor,
    *,
    group: torch.distributed.ProcessGroup,
    **kwargs: Any,
) -> Any:
    if group.size() == 1 and output.data_ptr() == source.data_ptr():
        return None
    return collective(output, source, group=group, **kwargs)


def _keep_freed_memory() -> None:
    """Lets glibc keep up to 1 GiB that an update frees for the next one, unless the environment
    decides; other C libraries have no such call."""
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _KEPT_MEMORY.items():
            mallopt(option, value)


def _called_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def _cuda_for_megatron(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_megatron() else original(self, *args, **kwargs)

    return cuda


def _type_for_megatron(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizers compare `tensor.type()` with "torch.cuda.FloatTensor" and the like."""

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if not args and not kwargs and _called_by_megatron():
            return "torch.cuda." + answer.rsplit(".", 1)[-1]
        return answer

    return tensor_type
