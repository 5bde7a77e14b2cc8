"""How many graphs torch.compile makes of Megatron-Core's fused bias-dropout-add in a real stage.

Compiled functions run as their parts on the fake device, so the calls of an update and of an
evaluation are noted there, and made again on the CPU: the guards, which decide what is compiled
anew, are the same; no code is generated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import megatron.core.fusions.fused_bias_dropout as fusions
import torch

from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.rank_update import resolved_config, start_rank, take_rank
from megatron_kosmosg.rehearsal.stand_ins import StandIns

FUNCTIONS = {
    "training": "bias_dropout_add_fused_train",
    "evaluation": "bias_dropout_add_fused_inference",
}
OTHER_LENGTHS = (2, -2, 4)
"""What later batches are longer by than the first."""


def count_graphs(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """{"training", "evaluation": number of graphs, "limit": after which torch compiles no more}."""
    config, calls = resolved_config(case, stand_ins), {}
    originals = {name: _plain(getattr(fusions, name)) for name in FUNCTIONS.values()}
    for name, function in originals.items():
        calls[name] = []
        setattr(fusions, name, _noting(function, calls[name]))
    take_rank(case, stand_ins)
    with stand_ins.device():
        rank = start_rank(config, case, stand_ins)
        rank.update()
        rank.evaluate()
    graphs = {
        mode: _graphs(originals[name], calls[name], case.length, mode == "training")
        for mode, name in FUNCTIONS.items()
    }
    return graphs | {"limit": torch._dynamo.config.recompile_limit}


@dataclass(frozen=True)
class _Like:
    """A tensor but for its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    is_view: bool

    def made(self, length: int, added: int) -> torch.Tensor:
        """On the CPU, `added` longer along the sequence."""
        shape = tuple(size + added if size == length else size for size in self.shape)
        tensor = torch.zeros(shape, dtype=self.dtype)
        tensor = tensor.view(shape) if self.is_view else tensor
        return tensor.requires_grad_(self.requires_grad)


def _plain(compiled: Callable) -> Callable:
    return compiled._torchdynamo_orig_callable


def _noting(function: Callable, calls: list) -> Callable:
    def call(x_with_bias: tuple, residual: torch.Tensor, prob: float) -> torch.Tensor:
        noted = (*(_like(x) for x in (*x_with_bias, residual)), prob)
        if noted not in calls:
            calls.append(noted)
        return function(x_with_bias, residual, prob)

    return call


def _like(tensor: torch.Tensor | None) -> _Like | None:
    if tensor is None:
        return None
    return _Like(tuple(tensor.shape), tensor.dtype, tensor.requires_grad, tensor._is_view())


def _graphs(function: Callable, calls: list[tuple], length: int, trains: bool) -> int:
    """Graphs after these calls, made again at several lengths in turn."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, backend=backend)
    with torch.set_grad_enabled(trains):
        for added in (0, *OTHER_LENGTHS):
            for x, bias, residual, prob in calls:
                x, bias, residual = (
                    None if like is None else like.made(length, added)
                    for like in (x, bias, residual)
                )
                compiled((x, bias), residual, prob)
    return len(graphs)
