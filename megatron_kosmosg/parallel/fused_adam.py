"""AdamW in the state layout of the fused GPU optimizers, for machines that have none.

Megatron-Core takes TransformerEngine's FusedAdam, else NVIDIA apex's, else torch's AdamW,
whose per-parameter `step` its distributed optimizer cannot save and load exactly. Where neither is
installed, this class takes their place: `step` sits in the parameter group.
"""

from __future__ import annotations

from collections.abc import Iterable

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer


def install() -> str:
    """Name of the Adam that Megatron's optimizers now use: transformer_engine, apex or own."""
    if megatron_optimizer.Adam is not FusedLayoutAdamW and not (
        megatron_optimizer.USING_PYTORCH_OPTIMIZER
    ):
        return "transformer_engine" if distrib_optimizer.USING_TE_OPTIMIZER else "apex"
    megatron_optimizer.Adam = distrib_optimizer.Adam = FusedLayoutAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    return "own"


class FusedLayoutAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; state per parameter: exp_avg and exp_avg_sq."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("an update in a CUDA graph (capturable=True) needs a fused optimizer")
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (adam_w_mode=True) is implemented")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            states = [self.state[p] for p in parameters]
            exp_avgs = [state["exp_avg"] for state in states]
            fused_update(group, parameters, exp_avgs, [state["exp_avg_sq"] for state in states])


def fused_update(group: dict, parameters: list, exp_avgs: list, exp_avg_sqs: list) -> None:
    """Updates in place, by torch's kernel that reads and writes every tensor once: 28 bytes a
    parameter. Operations over all tensors, one after the other, move 80."""
    beta1, beta2 = group["betas"]
    step = torch.full((), float(group["step"]), device=parameters[0].device)
    torch._fused_adamw_(
        parameters,
        [p.grad.to(p.dtype) for p in parameters],
        exp_avgs,
        exp_avg_sqs,
        [],
        [step] * len(parameters),
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
