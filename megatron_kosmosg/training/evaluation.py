"""Held-out numbers during training: the loss over fixed batches, then the stage's own probe.

A stop request ends an evaluation between two batches; the run that continues makes up for it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_kosmosg.checkpoint.rng_state import restore_rng_state, rng_state
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.samples import StreamDataset
from megatron_kosmosg.monitoring.signals import StopRequest
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.training.batches import BatchFeed
from megatron_kosmosg.training.metrics import MetricsWriter
from megatron_kosmosg.training.run_display import ProgressDisplay
from megatron_kosmosg.training.stage import Probe, Stage
from megatron_kosmosg.training.step import Reporter, forward_losses
from megatron_kosmosg.training.wrapping import whole_parameters


class Evaluations:
    """Decides when a run evaluates, and where the numbers go. All methods are collectives but
    `is_due`."""

    def __init__(
        self,
        stage: Stage,
        config: RunConfig,
        context: ParallelContext,
        chunks: list[DistributedDataParallel],
        heldout: StreamDataset | None,
        metrics: MetricsWriter,
        display: ProgressDisplay,
        stop: StopRequest,
    ) -> None:
        self._stage, self._config, self._context = stage, config, context
        self._chunks, self._heldout = chunks, heldout
        self._metrics, self._display, self._stop = metrics, display, stop

    def is_due(self, iteration: int) -> bool:
        """Whether this iteration is followed by a loss, images or a measurement of them."""
        config = self._config
        intervals = (config.logging.image_interval, config.evaluation.every)
        return self._has_loss(iteration) or any(is_due(iteration, each) for each in intervals)

    def is_missing(self, iteration: int) -> bool:
        """Whether the numbers of this iteration were due and are not in the metrics."""
        if not (self._has_loss(iteration) or is_due(iteration, self._config.evaluation.every)):
            return False
        known = [self._metrics.has_evaluation(iteration)]  # rank 0 alone has the file
        dist.broadcast_object_list(known, src=0)
        return not known[0]

    def run(self, iteration: int) -> bool:
        """Evaluates; False if the ranks agreed to stop before it was done."""
        stream = self._heldout if self._has_loss(iteration) else None
        with whole_parameters(self._chunks):
            probe = evaluate(
                self._stage,
                self._config,
                self._context,
                self._chunks,
                iteration,
                stream,
                self._stop,
            )
        if probe is None:
            return False
        self._metrics.evaluation(iteration, probe)
        if probe.metrics or probe.images:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in probe.metrics.items())
            self._display.log(f"iteration {iteration} | held out: {numbers or 'images only'}")
        return True

    def _has_loss(self, iteration: int) -> bool:
        training = self._config.training
        return iteration == training.train_iters or is_due(iteration, training.eval_interval)


def is_due(iteration: int, interval: int) -> bool:
    """Whether something that happens every `interval` iterations (0: never) happens now."""
    return interval > 0 and iteration % interval == 0


def evaluate(
    stage: Stage,
    config: RunConfig,
    context: ParallelContext,
    chunks: list[DistributedDataParallel],
    iteration: int,
    heldout: StreamDataset | None,
    stop: StopRequest,
) -> Probe | None:
    """Metrics and images; None if the ranks agreed to stop meanwhile. Training continues
    afterwards as if this had not happened.

    Args:
        heldout: the stream whose first `training.eval_iters` global batches give a mean loss, in
            evaluation mode; None leaves the loss out.
    """
    state = rng_state()
    for chunk in chunks:
        chunk.eval()
    probe = None
    with torch.no_grad():
        metrics: dict[str, float] | None = {}
        if heldout is not None:
            metrics = _heldout_losses(stage, config, context, chunks, heldout, stop)
        if metrics is not None:
            probe = _from_last_pipeline_stage(stage.probe(chunks, iteration), context)
    for chunk in chunks:
        chunk.train()
    restore_rng_state(state)
    if probe is None or metrics is None:
        return None
    return replace(probe, metrics={**metrics, **probe.metrics})


def _heldout_losses(
    stage: Stage,
    config: RunConfig,
    context: ParallelContext,
    chunks: list[DistributedDataParallel],
    heldout: StreamDataset,
    stop: StopRequest,
) -> dict[str, float] | None:
    feed = BatchFeed(heldout, config, context, start_sample=0, split="heldout")
    try:
        iterators = feed.chunk_iterators(len(chunks))
        reporter = Reporter(context, stage.remote_score)
        passes = []
        for _ in range(config.training.eval_iters):
            passes.append(
                forward_losses(stage, config, context, chunks, feed, iterators, reporter).losses
            )
            if stop.agreed(context.device):
                return None
    finally:
        feed.close()
    return {name: sum(losses[name] for losses in passes) / len(passes) for name in passes[0]}


def _from_last_pipeline_stage(probe: Probe | None, context: ParallelContext) -> Probe | None:
    """The probe of the first replica's last pipeline stage, on every rank; others have none."""
    speaks = context.is_last_pipeline_stage and context.tp_rank == 0 and context.dp_rank == 0
    source = torch.tensor([context.rank if speaks else 0], device=context.device)
    dist.all_reduce(source, op=dist.ReduceOp.MAX)
    spoken = [probe]
    dist.broadcast_object_list(spoken, src=int(source.item()))
    return spoken[0]
