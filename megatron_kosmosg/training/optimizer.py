"""AdamW and its learning rate, through Megatron-Core (facts of the authors' runs, paper section 3).

Weight decay reaches every trainable tensor, biases and norms included: Megatron-Core's default
leaves those out. The learning rate of update n is lr*n/warm-up, then falls linearly to min_lr.
"""

from __future__ import annotations

import math
import warnings
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_kosmosg.checkpoint.optimizer_state import begin_state, updating_parts
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel import core_versions, fused_adam
from megatron_kosmosg.parallel.platform import torch_dtype

_NORM_EPSILON = 1e-6
"""Megatron-Core's, added to the norm before the division."""


def check_optimizer(config: RunConfig, device: torch.device) -> None:
    """Raises ConfigError where this rank cannot keep the optimizer's states as `config` says."""
    if config.optimizer.optimizer_cpu_offload and device.type == "cpu":
        raise ConfigError(
            "optimizer.optimizer_cpu_offload=true takes states out of the memory of a GPU, and "
            "this run is on the CPU; set optimizer.optimizer_cpu_offload=false"
        )
    found = fused_adam.install()
    if config.optimizer.use_precision_aware_optimizer and found != "transformer_engine":
        raise ConfigError(
            "optimizer.use_precision_aware_optimizer=true needs the FusedAdam of "
            f"TransformerEngine, and Adam is here that of: {found}; install the extra `gpu` "
            "(docs/install.md), or set optimizer.use_precision_aware_optimizer=false (and "
            "optimizer.exp_avg_dtype and optimizer.exp_avg_sq_dtype to fp32)"
        )


def build_optimizer(config: RunConfig, chunks: list[DistributedDataParallel]) -> ChainedOptimizer:
    """The optimizer of this rank's trainable parameters; empty but usable when all are frozen."""
    settings, precision = config.optimizer, config.training.precision
    mcore = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=torch_dtype(precision),
        initial_loss_scale=settings.initial_loss_scale,
        min_loss_scale=settings.min_loss_scale,
        loss_scale_window=settings.loss_scale_window,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_precision_aware_optimizer=settings.use_precision_aware_optimizer,
        # TransformerEngine would give their last 16 bits alone to a checkpoint, as if they were
        # the weights.
        store_param_remainders=False,
        exp_avg_dtype=torch_dtype(settings.exp_avg_dtype),
        exp_avg_sq_dtype=torch_dtype(settings.exp_avg_sq_dtype),
        optimizer_cpu_offload=settings.optimizer_cpu_offload,
        optimizer_offload_fraction=settings.optimizer_offload_fraction,
    )
    # {} and not None: None selects Megatron's own exceptions from weight decay.
    if mcore.optimizer_cpu_offload:
        core_versions.prepare_offload(mcore)
    with warnings.catch_warnings():
        # It takes torch 2.13 for an older one than 2.3.
        warnings.filterwarnings("ignore", "CPU offload is recommended for PyTorch")
        built = get_megatron_optimizer(
            mcore, [*chunks], config_overrides={}, use_gloo_process_groups=False
        )
    optimizer = cast(ChainedOptimizer, built)  # it always is one, of one or of more
    for part in updating_parts(optimizer):
        begin_state(part)  # a save before the first update needs Adam's state, too
    return optimizer


def build_lr_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """The schedule, in iterations; `step(1)` before an update sets that update's rate."""
    settings = config.optimizer
    decay_iters = settings.lr_decay_iters or config.training.train_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=decay_iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=decay_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # the config decides; differences were checked before
    )


def squared_gradient_norm(optimizer: ChainedOptimizer, device: torch.device) -> torch.Tensor:
    """The squared norm of the gradients of all ranks, as `apply_update` will find them: a fp32
    scalar on `device`, infinite where fp16 gradients overflowed (their loss scale is then lowered).

    Megatron-Core's own waits for the device once for every parameter where neither
    TransformerEngine nor apex is installed.
    """
    if optimizer.prepare_grads():
        return torch.full((), math.inf, device=device)
    gradients = [
        gradient
        for part in optimizer.chained_optimizers
        for gradient in core_versions.gradients_for_norm(part)
    ]
    if gradients:  # a rank may hold frozen parts alone
        norms = torch._foreach_norm(gradients)
        squared = torch.linalg.vector_norm(torch.stack(norms)).square()
    else:
        squared = torch.zeros((), device=device)
    dist.all_reduce(squared, group=optimizer.get_grad_stats_parallel_group())
    return squared


def apply_update(optimizer: MegatronOptimizer, loss: float, norm: float) -> bool:
    """Whether the update was made: not if anything is not finite.

    loss: the global loss; norm: the root of `squared_gradient_norm`. Both are equal on all ranks,
    so that all ranks decide alike.
    """
    if not math.isfinite(norm) or not math.isfinite(loss):
        return False
    clip = optimizer.config.clip_grad
    # Of another precision than the parameter, which torch forbids `grad`.
    kept = "decoupled_grad" if optimizer.config.use_precision_aware_optimizer else "grad"
    found = [getattr(parameter, kept, None) for parameter in _parameters(optimizer)]
    gradients = [gradient for gradient in found if gradient is not None]
    factor = clip / (norm + _NORM_EPSILON)
    if 0 < factor < 1 and gradients:
        torch._foreach_mul_(gradients, factor)
    return bool(optimizer.step_with_ready_grads())


def _parameters(optimizer: MegatronOptimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
