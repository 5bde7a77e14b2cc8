"""Forward and backward passes recorded as CUDA graphs, for inputs of one shape.

A replay costs one launch instead of thousands. It writes into the memory of the one before: what a
pass with a gradient returned is gone when the next begins, and two of them may not be under way at
once. What a pass without one returned is the caller's, who may keep it (score/targets.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch

Pass = Callable[..., torch.Tensor]


def record_passes(run: Pass, inputs: Sequence[torch.Tensor]) -> Pass:
    """The pass `run`, which is replayed for inputs with the shapes and dtypes of `inputs` and run
    for others.

    Those of `inputs` that want a gradient get one. RuntimeError without a GPU. Call it before other
    threads use the GPU or pin memory: they would break the recording.
    """
    if inputs[0].device.type != "cuda":
        raise RuntimeError(f"CUDA graphs need a GPU, and this process runs on {inputs[0].device}")
    examples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    # For a function, a function: its annotation names all that it takes.
    replay = cast(Pass, torch.cuda.make_graphed_callables(run, examples))
    return _Recorded(run, replay, examples)


class _Recorded:
    def __init__(self, run: Pass, replay: Pass, examples: Sequence[torch.Tensor]) -> None:
        self._run, self._replay = run, replay
        self._forms = [_form(x) for x in examples]
        self._is_under_way = False

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if self._is_under_way or [_form(x) for x in inputs] != self._forms:
            return self._run(*inputs)
        output = self._replay(*inputs)
        if not wants_gradient:
            return output.clone()
        self._is_under_way = True
        output.register_hook(self._arrived)
        return output

    def _arrived(self, gradient: torch.Tensor) -> None:
        self._is_under_way = False


def _form(x: torch.Tensor) -> tuple:
    """The properties of the inputs that must be equal for a replay. Where no gradient is recorded,
    none is wanted."""
    return x.shape, x.dtype, x.requires_grad
