"""The seam between the loop and what is trained: a Stage builds the model, the data and the loss.

The loop takes one Stage and never knows which. A new objective is a new file in `stages/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.transformer.module import MegatronModule
from PIL import Image

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.samples import Split, StreamDataset
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.score.remote import RemoteScore

LossFunction = Callable[..., tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class InitialWeights:
    """Which checkpoint fills the model at the start of a run, strictly.

    Every key of the model is read from `path` except those under the `absent` prefixes, and every
    model key of the checkpoint is used except those under the `unused` prefixes; both lists must
    match exactly or loading fails with the keys that differ.
    """

    path: str
    stage: str
    """Stage that must have written the checkpoint."""
    absent: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    """Ends of the names of weights that the checkpoint may lack: they start as they were drawn."""


@dataclass(frozen=True)
class Probe:
    """What a stage reports beyond its held-out loss: scalars by name and images by name."""

    metrics: dict[str, float] = field(default_factory=dict)
    images: dict[str, Image.Image] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of an image, what each of its rows was made from, where that is known."""


class Stage(Protocol):
    """What a training stage has to offer to the loop, which knows no more of it. `config` is the
    whole run's config, unchanged."""

    name: str
    config: RunConfig
    remote_score: RemoteScore | None
    """The ranks that answer this rank's losses, where others do: a pass waits for all answers."""

    def build_model(self, context: ParallelContext) -> Sequence[MegatronModule]:
        """Model chunks of this rank, fp32, on `layout.device`; `requires_grad` is decided here."""
        ...

    def build_dataset(self, split: Split) -> StreamDataset:
        """The sample stream of `split` (train | heldout), a pure function of its position."""
        ...

    def forward_step(
        self, data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
    ) -> tuple[Any, LossFunction]:
        """Megatron-Core's contract, per-token-loss form.

        Returns (output, loss_func); loss_func(output) gives (loss summed over the micro-batch's
        items, number of items as an int tensor, {name: tensor [sum, count]} to report).
        """
        ...

    def initial_weights(self) -> InitialWeights | None:
        """The checkpoint of the previous stage, or None when training starts from scratch."""
        ...

    def probe(self, model: Sequence[torch.nn.Module], iteration: int) -> Probe | None:
        """Metrics and images of fixed held-out prompts; called on all ranks together. None: the
        run is about to be stopped."""
        ...

    def flops_per_iteration(self, num_tokens: int, num_images: int, num_targets: int) -> float:
        """FLOPs of one update (multiply-add = 2) for the work actually done: positions in,
        prompt images, target images; without recomputation."""
        ...
