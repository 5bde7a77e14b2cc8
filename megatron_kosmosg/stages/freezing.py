"""Which parameters of a model train: exactly those of the modules a stage names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def train_only(model: nn.Module, modules: Iterable[nn.Module | None]) -> None:
    """Freeze `model` except the given modules; None stands for a part another rank holds."""
    model.requires_grad_(False)
    for module in modules:
        if module is not None:
            module.requires_grad_(True)
