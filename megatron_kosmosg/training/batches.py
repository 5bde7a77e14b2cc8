"""Micro-batches as the stages see them: loaded on one rank of each pipeline stage, broadcast, on
device.

Images are decoded on the first pipeline stage alone. Also counts the work in the batches and the
time spent waiting for them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import cast

import torch

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.loader import MicroBatchIterator
from megatron_kosmosg.data.normalise import normalise_batch
from megatron_kosmosg.data.samples import ImageStream, Split, StreamDataset
from megatron_kosmosg.parallel.broadcast import broadcast_batch
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.replacements import ReplacementExchange
from megatron_kosmosg.parallel.transfers import pinned

Batch = dict[str, torch.Tensor]


@dataclass
class UpdateWork:
    """What went through the model on this replica."""

    tokens: int = 0
    """Positions, padding included where it is: the decoder computes them."""
    padding: int = 0
    """Those of them that are padding."""
    images: int = 0
    """Prompt images."""
    rows: int = 0
    """Samples: packed rows, captions or prompts."""
    bad_samples: int = 0
    """Images that could not be decoded."""

    def add(self, other: UpdateWork) -> None:
        """Counts what went through the model in `other`, too."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


class BatchFeed:
    """Iterator of broadcast device batches that starts at stream position `start_sample`."""

    def __init__(
        self,
        dataset: StreamDataset | ImageStream,
        config: RunConfig,
        context: ParallelContext,
        start_sample: int,
        split: Split = "train",
        num_updates: int | None = None,
    ) -> None:
        """Begins to read at sample `start_sample`.

        Args:
            dataset: on ranks behind the first pipeline stage one that leaves images undecoded.
            start_sample: samples that all ranks have consumed.
            split: the split that the dataset is the stream of.
            num_updates: how many global batches will be asked for, behind which `peek` does not
                look; None: no end.
        """
        self._dataset, self._config, self._context, self._split = dataset, config, context, split
        self._exchange: ReplacementExchange | None = None
        self._work = UpdateWork()
        self._peeked: tuple[Batch, UpdateWork] | None = None
        self._left = math.inf
        if num_updates is not None:
            self._left = num_updates * num_microbatches(config, context.dp_size)
        self._loader: MicroBatchIterator | None = None
        if context.tp_rank == 0:  # the other tensor-parallel ranks get the batch by broadcast
            self._loader = MicroBatchIterator(
                dataset,
                global_batch_size=config.training.global_batch_size,
                micro_batch_size=config.training.micro_batch_size,
                dp_rank=context.dp_rank,
                dp_size=context.dp_size,
                start_sample=start_sample,
                num_workers=config.data.num_workers,
                balance_tokens=config.data.balance_tokens,
                finish=partial(pinned, device=context.device),
            )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, work = self._peeked or self._read()
        self._peeked = None
        self._left -= 1
        # Not when it is read: a batch belongs to the update that asks for it.
        self._work.add(work)
        return batch

    def peek(self) -> Batch | None:
        """The batch that the next `next` gives, read now; None behind the last one. On all ranks of
        a tensor-parallel group together."""
        if self._peeked is None and self._left > 0:
            self._peeked = self._read()
        return None if self._peeked is None else self._peeked[0]

    def _read(self) -> tuple[Batch, UpdateWork]:
        loaded, work = None, UpdateWork()
        if self._loader is not None:
            loaded = self._agreed(next(self._loader))
            if "packed" not in loaded:
                work.padding = int(loaded["padding_mask"].sum())
        batch = normalise_batch(broadcast_batch(loaded, self._context), self._config)
        work.tokens = batch["packed" if "packed" in batch else "tokens"].numel()
        work.images = batch["pixel_values"].shape[0]
        work.rows = batch["tokens"].shape[0]
        work.bad_samples = int(batch["bad_samples"])
        return batch, work

    def _agreed(self, batch: Batch) -> Batch:
        """The batch as the first pipeline stage has it."""
        if "replacements" not in batch or self._context.pp_size == 1:
            return batch
        if self._exchange is None:
            timeout = self._config.parallel.timeout_seconds
            self._exchange = ReplacementExchange(self._context, self._split, timeout)
        local, positions = batch["replacements"].tolist(), batch["stream_positions"].tolist()
        agreed = self._exchange.share(positions[0], local)
        if agreed == local:
            return batch
        stream = cast(ImageStream, self._dataset)  # no other stream has replacements
        samples = [stream[position] for position in positions]
        return stream.collate(samples, batch["tokens"].shape[1], agreed)

    def chunk_iterators(self, num_chunks: int) -> list[Iterator[Batch]]:
        """One iterator per model chunk of this rank, all over the same batches."""
        return list(itertools.tee(self, num_chunks)) if num_chunks > 1 else [self]

    def pop_work(self) -> UpdateWork:
        """The work since the last call."""
        work, self._work = self._work, UpdateWork()
        return work

    def pop_wait(self) -> float:
        """Seconds spent waiting for data since the last call; 0 on ranks that do not load."""
        return 0.0 if self._loader is None else self._loader.pop_wait()

    def prepare(self) -> None:
        """Returns when this rank's first batch can be had; the first start builds indices here."""
        if self._loader is not None:
            self._loader.prepare()

    def close(self, *, wait: bool = True) -> None:
        """Ends reading. With `wait` it returns when the reads under way are over."""
        if self._loader is not None:
            self._loader.close(wait=wait)
