"""What an optimizer's state in a checkpoint does not settle: this run's settings, Adam's count, and
how Megatron-Core's optimizer on the host (`optimizer.optimizer_cpu_offload`) keeps its states."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_kosmosg.config.schema import RunConfig

_HYPER_PARAMETERS = ("lr", "weight_decay", "betas", "eps")


def updating_parts(optimizer: ChainedOptimizer) -> list[MegatronOptimizer]:
    """The optimizers in it that have parameters on this rank: all may be frozen."""
    # Every class that a chain holds says so, their common one does not.
    return [part for part in optimizer.chained_optimizers if not cast(Any, part).is_stub_optimizer]


def begin_state(part: MegatronOptimizer) -> None:
    """Zero moments, which a save before the first update needs, too."""
    inner: Any = part.optimizer
    if isinstance(inner, HybridDeviceOptimizer):
        # Its own way is an update with random gradients.
        for optimizer in inner.sub_optimizers:
            for parameter in _parameters(optimizer):
                state = optimizer.state[parameter]
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
                if optimizer is not inner.gpu_optimizer:
                    state["step"] = torch.zeros(())
        inner._sync_sub_optimizers_state_to_hdo()
    elif part.config.use_precision_aware_optimizer:
        for parameter in _parameters(inner):
            inner.initialize_state(parameter, store_param_remainders=False)
    else:
        part.init_state_fn(inner, part.config)


def restore_settings(config: RunConfig, optimizer: ChainedOptimizer, num_updates: int) -> None:
    """Puts this run's hyper-parameters and the update count back after a checkpoint was loaded.

    The checkpoint's parameter groups carry the old run's values; and Adam's update count is
    absent from groups of ranks whose parameters are all frozen.
    """
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = config.optimizer.lr, config.optimizer.min_lr
        group["betas"] = (config.optimizer.adam_beta1, config.optimizer.adam_beta2)
        group["eps"] = config.optimizer.adam_eps
    for inner in _on_host(optimizer):
        for state in inner.state.values():
            for name, value in state.items():
                # It keeps views of the states of whole parameters, of which it updates a share.
                if (
                    isinstance(value, torch.Tensor)
                    and value.untyped_storage().nbytes() > value.nbytes
                ):
                    state[name] = value.clone()
    set_num_updates(optimizer, num_updates)


def set_num_updates(optimizer: ChainedOptimizer, num_updates: int) -> None:
    """Writes Adam's update count into every group, also empty ones, so that ranks agree."""
    for group in optimizer.param_groups:
        group["step"] = num_updates
    for inner in _on_host(optimizer):
        for group in inner.param_groups:
            # It copies its groups over those of its parts before each update: their count as well.
            del group["step"]
        for part in inner.sub_optimizers:
            if part is inner.gpu_optimizer:
                for group in part.param_groups:
                    group["step"] = num_updates
            else:
                for parameter in _parameters(part):
                    part.state[parameter]["step"].fill_(num_updates)


def drop_local_settings(optimizer: ChainedOptimizer, state: dict[str, Any]) -> None:
    """Takes out of `state`, which is to be saved, what an optimizer on the host adds to its groups:
    classes, which are no plain data, and how it works."""
    for inner in _on_host(optimizer):
        for group in state["optimizer"]["param_groups"]:
            for name in _local_settings(inner):
                group.pop(name, None)


def add_local_settings(optimizer: ChainedOptimizer, state: dict[str, Any]) -> None:
    """Puts it back into `state`, which was loaded and is to be handed to `optimizer`."""
    for inner in _on_host(optimizer):
        for group in state["optimizer"]["param_groups"]:
            group.update(_local_settings(inner))


def _local_settings(inner: HybridDeviceOptimizer) -> dict[str, Any]:
    return {key: value for key, value in inner.defaults.items() if key not in _HYPER_PARAMETERS}


def _on_host(optimizer: ChainedOptimizer) -> list[HybridDeviceOptimizer]:
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return [each for each in inner if isinstance(each, HybridDeviceOptimizer)]


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
