"""One optimizer update: Megatron-Core's schedule over the micro-batches, then the optimizer.

The loss is normalised by the number of items in the global batch (`calculate_per_token_loss`):
a stage returns sums, Megatron-Core divides the gradients, `Totals` divides what is reported.
Long because what a pass sums over the ranks stands beside the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kosmosg.checkpoint.weight_average import WeightAverage
from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.transfers import upload_numbers
from megatron_kosmosg.score.remote import RemoteScore, ScoreWork
from megatron_kosmosg.score.schedule import forward_backward_function
from megatron_kosmosg.training.batches import Batch, BatchFeed, UpdateWork
from megatron_kosmosg.training.images_ahead import encode_images_ahead
from megatron_kosmosg.training.optimizer import apply_update, squared_gradient_norm
from megatron_kosmosg.training.stage import Stage


@dataclass(frozen=True)
class Totals:
    """The sums over one pass over a global batch, equal on every rank."""

    losses: dict[str, float]
    """`loss` and its parts, means over the global batch's items."""
    work: UpdateWork
    data_wait: float
    """Seconds a loading rank waited for data, mean over those ranks."""
    score: ScoreWork = field(default_factory=ScoreWork)
    """Summed over ranks, latency a mean; zeros where the U-Net sits beside the decoder."""


@dataclass(frozen=True)
class Update:
    totals: Totals
    grad_norm: float
    """Before clipping; infinite when fp16 gradients overflowed."""
    made: bool
    """False if the parameters stayed as they were: of a non-finite loss or gradient, or because no
    score rank was left, of which `totals.score.unanswered` tells."""


def configure_schedules(
    chunks: list[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    remote_score: RemoteScore | None,
) -> None:
    """Tells Megatron-Core's schedules how to scale the loss and finish the gradients.

    Args:
        remote_score: the stage's; images whose targets its ranks could not read do not count.
    """

    def finish(
        model: list[DistributedDataParallel],
        num_items: torch.Tensor,
        *,
        pg_collection: ProcessGroupCollection,
        **named: Any,
    ) -> None:
        # Known now and not later: all backward passes are over, and `drain` will forget it.
        if remote_score is not None:
            num_items -= remote_score.left_out().to(num_items)
        # Given no number of items, Megatron-Core adds up the gradients and leaves the division to
        # the lines below: its own, in 0.16, waits for the device to see whether there is anything.
        finalize_model_grads([*model], None, pg_collection=pg_collection, **named)
        # Only the last pipeline stage counted the items: it tells the others, then replicas add up.
        pipeline = pg_collection.pp
        last = dist.get_global_rank(pipeline, pipeline.size() - 1)
        dist.broadcast(num_items, last, group=pipeline)
        dist.all_reduce(num_items, group=pg_collection.dp_cp)
        scaling = 1.0 / num_items.clamp(min=1)
        for chunk in model:
            chunk.scale_gradients(cast(float, scaling))  # of a tensor, the host need not wait

    for chunk in chunks:
        chunk.config.grad_scale_func = optimizer.scale_loss
        chunk.config.finalize_model_grads_func = finish
    if chunks[0].ddp_config.overlap_grad_reduce:
        pauses = [chunk.no_sync for chunk in chunks]
        for chunk in chunks:
            # Annotated as one function, and wanted as a list of each chunk's where there are more.
            chunk.config.no_sync_func = cast(Any, pauses if len(pauses) > 1 else pauses[0])


class Reporter:
    """Sums losses, work and waiting time over ranks; loss names are exchanged once."""

    def __init__(self, context: ParallelContext, remote_score: RemoteScore | None = None) -> None:
        """Begins with no sums. `remote_score` is the stage's, which counts what passed over the
        links to score ranks."""
        self._context, self._remote_score = context, remote_score
        self._names: list[str] | None = None

    def totals(
        self,
        losses: list[dict[str, torch.Tensor]],
        feed: BatchFeed,
        beside: torch.Tensor | None = None,
    ) -> tuple[Totals, float]:
        """(the totals, the number in `beside`, 0 for none). One collective, and one transfer to
        the host of all that a pass tells it; a stop signal of a score rank is passed on.

        losses: what the micro-batches of the last pipeline stage reported, else empty. A value is
        [sum, count]; equal on the tensor-parallel ranks of a replica. beside: scalar on the device.
        """
        context = self._context
        # Stages before the last report no losses, but the vector has to be as long on every rank.
        if self._names is None:
            gathered: list[list[str]] = [[] for _ in range(context.world_size)]
            dist.all_gather_object(gathered, list(losses[0]) if losses else [])
            self._names = next(names for names in gathered if names)
        work, wait, loads = feed.pop_work(), feed.pop_wait(), context.tp_rank == 0
        remote = self._remote_score
        score = ScoreWork() if remote is None else remote.pop_work()
        # One rank of each replica counts its work; bad targets are seen where the loss is.
        speaks_for_input = loads and context.pp_rank == 0
        speaks_for_loss = loads and context.is_last_pipeline_stage
        values = [0.0] * (2 * len(self._names)) + [
            float(work.tokens) if speaks_for_input else 0.0,
            float(work.padding) if speaks_for_input else 0.0,
            float(work.images) if speaks_for_input else 0.0,
            float(work.rows) if speaks_for_input else 0.0,
            wait,
            float(loads),
            score.waited,
            float(score.num_bytes),
            float(work.bad_samples if speaks_for_loss else 0) + score.bad_samples,
            score.idle,
            float(score.unanswered),
            float(score.ranks),
            float(score.queued),
            score.latency,
        ]
        vector = upload_numbers(values, torch.float64, context.device)
        if context.tp_rank == 0:
            for reported in losses:
                pairs = torch.cat([reported[name].detach().view(2) for name in self._names])
                vector[: pairs.numel()] += pairs.to(vector)
        extra = vector.new_zeros(1) if beside is None else beside.to(vector).view(1)
        dist.all_reduce(vector)
        # `beside` is equal on all ranks already. It joins behind the sum, for the one transfer.
        numbers = torch.cat([vector, extra]).tolist()
        # A score rank's stop signal came with its answers. Raised now that they are all here, it
        # counts when the ranks next agree whether to stop.
        if remote is not None:
            remote.pass_on_signal()
        known = numbers.pop()
        means = {
            name: numbers[2 * i] / max(numbers[2 * i + 1], 1.0)
            for i, name in enumerate(self._names)
        }
        *done, wait, loaders, waited, num_bytes, bad_samples = numbers[2 * len(means) : -5]
        idle, unanswered, ranks, queued, latency = numbers[-5:]
        counts = (int(num_bytes), int(bad_samples), int(unanswered), int(ranks), int(queued))
        score = ScoreWork(waited, idle, *counts, latency / context.dp_size)
        work = UpdateWork(*map(int, (*done, bad_samples)))
        return Totals(means, work, wait / loaders, score), known


def train_step(
    stage: Stage,
    config: RunConfig,
    context: ParallelContext,
    chunks: list[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    feed: BatchFeed,
    iterators: list[Iterator[Batch]],
    reporter: Reporter,
    average: WeightAverage | None = None,
) -> Update:
    """One global batch forward and backward, and one update of the parameters and of their
    average.

    Args:
        feed: counts what the iterators gave, and how long this rank waited for it.
        iterators: one for each model chunk of this rank, over the same micro-batches.
        average: of the weights, where one is kept.
    """
    # Megatron-Core adds to its gradient buffers, and the optimizer keeps gradients of its own.
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    ahead = partial(encode_images_ahead, feed, chunks)
    schedule = stage, config, context, chunks, iterators
    losses = _run_schedule(*schedule, forward_only=False, before_wait=ahead)
    # The norm is begun on the device before anything is read from it, so that the host waits once:
    # in `totals`, which brings the norm along. In fp16 this also unscales the gradients.
    squares = squared_gradient_norm(optimizer, context.device)
    totals, squared_norm = reporter.totals(losses, feed, squares)
    grad_norm = squared_norm**0.5
    # Gradients are incomplete without an answer; all ranks know it from the sum, and leave alike.
    if totals.score.unanswered:
        return Update(totals, grad_norm, made=False)
    is_made = apply_update(optimizer, totals.losses["loss"], grad_norm)
    # A skipped update must not pull the average towards weights that it has seen already.
    if is_made and average is not None:
        average.update()
    return Update(totals, grad_norm, is_made)


def forward_losses(
    stage: Stage,
    config: RunConfig,
    context: ParallelContext,
    chunks: list[DistributedDataParallel],
    feed: BatchFeed,
    iterators: list[Iterator[Batch]],
    reporter: Reporter,
) -> Totals:
    """The totals of a pass over one global batch without gradients."""
    losses = _run_schedule(stage, config, context, chunks, iterators, forward_only=True)
    return reporter.totals(losses, feed)[0]


def _run_schedule(
    stage: Stage,
    config: RunConfig,
    context: ParallelContext,
    chunks: list[DistributedDataParallel],
    iterators: list[Iterator[Batch]],
    *,
    forward_only: bool,
    before_wait: Callable[[], None] = lambda: None,
) -> list[dict[str, torch.Tensor]]:
    single = len(chunks) == 1
    run = forward_backward_function(
        config, context, chunks[0], forward_only=forward_only, before_wait=before_wait
    )
    losses = run(
        forward_step_func=stage.forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=chunks[0] if single else chunks,
        num_microbatches=num_microbatches(config, context.dp_size),
        seq_length=config.data.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
    )
    # Gradients took their answers in backward. Of a forward-only pass nothing has waited for them:
    # without this the losses would be read before they have come.
    if stage.remote_score is not None:
        stage.remote_score.drain()
    return losses
