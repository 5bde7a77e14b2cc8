"""Which parameters of a model train: exactly those of the modules a stage names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from megatron_kosmosg.models.kosmosg import KosmosG


def train_only(model: KosmosG, modules: Iterable[nn.Module | None]) -> None:
    """Freeze `model` except the given modules; None stands for a part another rank holds.

    All ranks call this together: pipeline stages learn whether anything before them trains.
    """
    model.requires_grad_(False)
    for module in modules:
        if module is not None:
            module.requires_grad_(True)
    model.agree_on_freezing()
