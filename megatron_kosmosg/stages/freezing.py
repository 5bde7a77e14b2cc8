"""Which parameters of a model train: exactly those of the modules a stage names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from megatron_kosmosg.models.chunks import agree_on_freezing
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel.layout import Layout


def train_only(
    chunks: list[KosmosG],
    named: Callable[[KosmosG], Iterable[nn.Module | None]],
    layout: Layout,
) -> list[KosmosG]:
    """`chunks`, frozen but for the modules that `named` gives of each.

    None stands for a part held elsewhere. All ranks call this together: pipeline stages learn
    whether anything before them trains.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        for module in named(chunk):
            if module is not None:
                module.requires_grad_(True)
    agree_on_freezing(chunks, layout)
    return chunks
