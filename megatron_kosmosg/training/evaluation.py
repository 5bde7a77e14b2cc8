"""Held-out numbers during training: the loss over fixed batches, then the stage's own probe."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.samples import StreamDataset
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.parallel.rng_state import restore_rng_state, rng_state
from megatron_kosmosg.training.batches import BatchFeed
from megatron_kosmosg.training.stage import Probe, Stage
from megatron_kosmosg.training.step import Reporter, forward_losses


def evaluate(
    stage: Stage,
    config: RunConfig,
    layout: Layout,
    chunks: list[DistributedDataParallel],
    iteration: int,
    heldout: StreamDataset | None,
) -> Probe:
    """Metrics and pictures; training continues afterwards as if this had not happened.

    heldout: the stream whose first `training.eval_iters` global batches give a mean loss, in
    evaluation mode; None leaves the loss out.
    """
    state = rng_state()
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        metrics = {}
        if heldout is not None:
            metrics = _heldout_losses(stage, config, layout, chunks, heldout)
        probe = _from_last_stage(stage.probe(chunks, iteration), layout)
    for chunk in chunks:
        chunk.train()
    restore_rng_state(state)
    return Probe({**metrics, **probe.metrics}, probe.images)


def _heldout_losses(
    stage: Stage,
    config: RunConfig,
    layout: Layout,
    chunks: list[DistributedDataParallel],
    heldout: StreamDataset,
) -> dict[str, float]:
    feed = BatchFeed(heldout, config, layout, start_sample=0)
    try:
        iterators = feed.chunk_iterators(len(chunks))
        reporter = Reporter(layout)
        passes = [
            forward_losses(stage, config, layout, chunks, feed, iterators, reporter).losses
            for _ in range(config.training.eval_iters)
        ]
    finally:
        feed.close()
    return {name: sum(losses[name] for losses in passes) / len(passes) for name in passes[0]}


def _from_last_stage(probe: Probe, layout: Layout) -> Probe:
    """The probe of the first replica's last pipeline stage, on every rank; others have none."""
    speaks = layout.is_last_stage and layout.tp_rank == 0 and layout.dp_rank == 0
    source = torch.tensor([layout.rank if speaks else 0], device=layout.device)
    dist.all_reduce(source, op=dist.ReduceOp.MAX)
    spoken = [probe]
    dist.broadcast_object_list(spoken, src=int(source.item()))
    return spoken[0]
