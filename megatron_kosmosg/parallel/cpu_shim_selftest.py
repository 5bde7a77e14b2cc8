"""Checks every place of Megatron-Core that the CPU shim covers, by running it.

A megatron-core upgrade that moves one of them stops the run at its start with the name of the
place, instead of an obscure CUDA error (or none) later.
"""

from __future__ import annotations

from collections.abc import Callable

import megatron.core
import torch


def run_self_test() -> list[str]:
    """The names of the places checked. Raises RuntimeError naming the first that fails."""
    state = torch.get_rng_state()
    try:
        for name, check in CHECKS.items():
            try:
                fits = check()
            except Exception as error:
                raise RuntimeError(_message(name, repr(error))) from error
            if not fits:
                raise RuntimeError(_message(name, "wrong answer"))
    finally:
        torch.set_rng_state(state)
    return list(CHECKS)


def _message(name: str, problem: str) -> str:
    return (
        f"The CPU shim does not fit megatron-core {megatron.core.__version__} at '{name}': "
        f"{problem}. Install the megatron-core version of constraints.txt."
    )


def _schedules() -> bool:
    from megatron.core.pipeline_parallel import schedules

    return schedules.torch.zeros([], dtype=torch.int, device="cuda").is_cpu


def _p2p() -> bool:
    from megatron.core.pipeline_parallel import p2p_communication

    p2p_communication.torch.cuda.synchronize()
    return p2p_communication.torch.cuda.current_device() == torch.device("cpu")


def _mappings() -> bool:
    from megatron.core.tensor_parallel import mappings

    return mappings.torch.empty(1, device=mappings.torch.cuda.current_device()).is_cpu


def _memory_buffer() -> bool:
    from megatron.core.utils import GlobalMemoryBuffer

    return GlobalMemoryBuffer().get_tensor([2, 2], torch.float32, "self-test").is_cpu


def _grad_buffer() -> bool:
    from megatron.core.distributed import param_and_grad_buffer

    device = param_and_grad_buffer.torch.cuda.current_device()
    return param_and_grad_buffer.torch.zeros(1, device=device).is_cpu


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


def _gradient_norm() -> bool:
    from megatron.core.optimizer import clip_grads

    return clip_grads.torch.tensor([1.0], dtype=torch.float, device="cuda").is_cpu


def _dtype_strings() -> bool:
    # As in distrib_optimizer and optimizer, which ask for the dtype through Tensor.type().
    scope = {"__name__": "megatron.core.self_test", "tensor": torch.zeros(1, dtype=torch.bfloat16)}
    inside = eval("tensor.type()", scope)
    return inside == "torch.cuda.BFloat16Tensor" and torch.zeros(1).type() == "torch.FloatTensor"


def _tracker() -> bool:
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
    from megatron.core.tensor_parallel import random

    seen = []

    def dropped(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.nn.functional.dropout(x, 0.5))
        return seen[-1]

    x = torch.ones(64, requires_grad=True)
    random.checkpoint(dropped, False, x).sum().backward()
    return len(seen) == 2 and torch.equal(*seen) and torch.equal(x.grad, seen[0])


def _checkpoint_exchange() -> bool:
    from megatron.core.dist_checkpointing import exchange_utils

    return exchange_utils.torch.empty(0, device="cuda").is_cpu


def _checkpoint_saver() -> bool:
    from megatron.core.dist_checkpointing.strategies import async_utils, state_dict_saver

    async_utils.torch.cuda.synchronize()
    device = state_dict_saver.torch.cuda.current_device()
    return state_dict_saver.torch.tensor([1], dtype=torch.int, device=device).is_cpu


def _timers() -> bool:
    from megatron.core.timers import Timers

    timer = Timers(log_level=0, log_option="max")("self-test", log_level=0)
    timer.start()
    timer.stop()
    return timer.elapsed() >= 0


CHECKS: dict[str, Callable[[], bool]] = {
    "pipeline_parallel.schedules: token counter": _schedules,
    "pipeline_parallel.p2p_communication: receive buffers": _p2p,
    "tensor_parallel.mappings: gather buffers": _mappings,
    "utils.GlobalMemoryBuffer": _memory_buffer,
    "distributed.param_and_grad_buffer": _grad_buffer,
    "optimizer.grad_scaler": _grad_scaler,
    "optimizer.clip_grads: clipping": _clip_by_norm,
    "optimizer.clip_grads: norm": _gradient_norm,
    "optimizer.distrib_optimizer: dtype strings": _dtype_strings,
    "tensor_parallel.random: tracker": _tracker,
    "tensor_parallel.random: recompute": _recompute,
    "dist_checkpointing.exchange_utils": _checkpoint_exchange,
    "dist_checkpointing.strategies.state_dict_saver": _checkpoint_saver,
    "timers": _timers,
}
