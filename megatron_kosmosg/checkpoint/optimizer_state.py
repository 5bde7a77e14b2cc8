"""What an optimizer's state in a checkpoint does not settle: this run's settings, Adam's count."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer

from megatron_kosmosg.config.schema import RunConfig


def restore_settings(config: RunConfig, optimizer: MegatronOptimizer, num_updates: int) -> None:
    """Puts this run's hyper-parameters and the update count back after a checkpoint was loaded.

    The checkpoint's parameter groups carry the old run's values; and Adam's update count is
    absent from groups of ranks whose parameters are all frozen.
    """
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = config.optimizer.lr, config.optimizer.min_lr
        group["betas"] = (config.optimizer.adam_beta1, config.optimizer.adam_beta2)
        group["eps"] = config.optimizer.adam_eps
    set_num_updates(optimizer, num_updates)


def set_num_updates(optimizer: MegatronOptimizer, num_updates: int) -> None:
    """Writes Adam's update count into every group, also empty ones, so that ranks agree."""
    for group in optimizer.param_groups:
        group["step"] = num_updates
