"""What differs between the Megatron-Core releases that this package runs on, and nothing else.

0.16.1 is the last for Python 3.11, 0.19.2 needs 3.12. Each function answers one change of the core
and asks for what it finds there, not for a version; the rest of the package calls these and knows
of one core only.
"""

from __future__ import annotations

import functools
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_model_type

_ADVICE = {
    "distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not",
    "dist_checkpointing.strategies.common": "load_common is deprecated",
    "dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}


def quieten() -> None:
    """Hides advice to programmers that 0.17 and later log at every start, save and resume."""
    for module, start in _ADVICE.items():
        logger = logging.getLogger(f"megatron.core.{module}")
        logger.addFilter(lambda record, start=start: not str(record.msg).startswith(start))


def backward_step(
    received: Any, output: Any, gradient: Any, model: torch.nn.Module, config: Any
) -> Any:
    """Gradient of what a pipeline stage received. 0.17 took the model's type out of the
    arguments."""
    model_type = [get_model_type(model)] if _ASKS_FOR_TYPE else []
    arguments = [received, output, gradient, *model_type, config]
    return schedules.backward_step(*arguments)


_ASKS_FOR_TYPE = "model_type" in inspect.signature(schedules.backward_step).parameters


def gradients_for_norm(optimizer: Any) -> list[torch.Tensor]:
    """The gradients of one optimizer that this rank counts in the norm; shared and copied
    parameters count once. Since 0.19 parameters may be in groups with norms of their own, and the
    method has another name."""
    named = ("get_grads_for_grad_norm", "get_main_grads_for_grad_norm")
    return next(getattr(optimizer, name) for name in named if hasattr(optimizer, name))()


def prepare_offload(config: OptimizerConfig) -> None:
    """Sends an optimizer on the host the way that Megatron-Core has for it, that of the
    precision-aware one. 0.16 would first compare the version of TransformerEngine, which this does
    not need, and fail where there is none."""
    config.use_precision_aware_optimizer = True
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True


def mlp_submodule(submodules: MLPSubmodules) -> Any:
    """The part from which a layer builds its MLP: since 0.18 a builder, because a spec draws a
    warning there."""
    build = getattr(MLP, "as_mlp_submodule", None)
    if build is None:
        return ModuleSpec(module=MLP, submodules=submodules)
    return functools.partial(build, submodules=submodules)


class SaveStrategy(TorchDistSaveShardedStrategy):
    """Writes the one form of checkpoints that every release reads.

    Since 0.17 a save in the background wants nvidia-resiliency-ext unless told otherwise. Since
    0.19 what is not sharded comes as one more object among the shards; 0.16 reads it in common.pt.
    """

    def async_save(
        self, sharded_state_dict: dict, checkpoint_dir: str | Path, async_strategy: str = ""
    ) -> Any:
        """The request that writes this rank's share, with the core's own writer."""
        common = sharded_state_dict.pop("common_state", None)
        if common is not None and torch.distributed.get_rank() == 0:
            torch.save(common.data, Path(checkpoint_dir) / "common.pt")
        taken = inspect.signature(super().async_save).parameters
        writer = {"async_strategy": "mcore"} if "async_strategy" in taken else {}
        return super().async_save(sharded_state_dict, Path(checkpoint_dir), **writer)


def adopt_learning_rates(saved: Any, lr: float, min_lr: float) -> None:
    """Puts this run's rates into the parameter groups of a saved optimizer, at any depth.

    Since 0.19 a group is found by its rates, so that a run could not go on with others.
    """
    if isinstance(saved, dict):
        for group in saved.get("param_groups", ()):
            group["max_lr"], group["min_lr"] = lr, min_lr
        for part in saved.values():
            adopt_learning_rates(part, lr, min_lr)
