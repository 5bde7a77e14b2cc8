"""What an evaluator is. A new one is a file with one class, and a line in registry.py.

It sees images and no model: whoever draws them, a training stage or a command, hands them over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_kosmosg.config.schema import RunConfig


@dataclass(frozen=True)
class GeneratedImages:
    """What a model drew for held-out prompts; row i of both belongs to the same prompt."""

    results: torch.Tensor
    """[n, 3, height, width] in [-1, 1]."""
    targets: torch.Tensor
    """The true images, of the same shape."""
    texts: tuple[str | None, ...] = ()
    """The words of each prompt; None, and no entry at all, where they are not known."""


class Evaluator(Protocol):
    """Built from the run's config on every rank, and run on the one that draws: what is large (a
    network, say) is better loaded in `run`."""

    def __init__(self, config: RunConfig) -> None: ...

    def run(self, images: GeneratedImages) -> Iterator[tuple[str, float]]:
        """Yields (name, value) of each metric; in the metrics of a run the evaluator's own name
        stands before it."""
        ...


def measure(evaluators: Mapping[str, Evaluator], images: GeneratedImages) -> dict[str, float]:
    """The metrics of all evaluators, in their order, as {`evaluator_metric`: value}."""
    return {
        f"{name}_{metric}": value
        for name, evaluator in evaluators.items()
        for metric, value in evaluator.run(images)
    }
