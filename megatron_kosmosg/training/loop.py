"""The training loop: restore, iterate, log, evaluate, save, stop. It never asks which stage runs.

Everything a run does over its life is in `fit`, in order.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from megatron_kosmosg.checkpoint.folder import CONFIG_FILE, find_checkpoint
from megatron_kosmosg.checkpoint.newest import Resumed, newest_checkpoint, resume
from megatron_kosmosg.checkpoint.save_and_resume import (
    Checkpointer,
    Progress,
    checkpoint_metadata,
)
from megatron_kosmosg.checkpoint.weights import load_weights
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import to_yaml
from megatron_kosmosg.config.paths import heartbeat_file, output_folder, trace_file
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.bad_images import check_bad_images
from megatron_kosmosg.monitoring.heartbeat import Heartbeat
from megatron_kosmosg.monitoring.iteration_trace import DecoderTrace
from megatron_kosmosg.monitoring.signals import StopRequest
from megatron_kosmosg.monitoring.stragglers import Stragglers
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.parallel.rendezvous import find_place
from megatron_kosmosg.training.batches import BatchFeed
from megatron_kosmosg.training.evaluation import Evaluations, is_due
from megatron_kosmosg.training.metrics import MetricsWriter, iteration_record
from megatron_kosmosg.training.optimizer import build_lr_scheduler, build_optimizer
from megatron_kosmosg.training.progress import ProgressDisplay
from megatron_kosmosg.training.stage import Stage
from megatron_kosmosg.training.step import Reporter, Update, connect, train_step
from megatron_kosmosg.training.wrapping import unwrap_model, whole_parameters, wrap_model

SLOW_RATIO = 1.5
"""A slowest rank above this multiple of the median is worth a line."""


def fit(stage: Stage, config: RunConfig, layout: Layout) -> bool:
    """True when all iterations are done, False when a signal asked to stop and state is saved."""
    place, stall_seconds = find_place(os.environ), config.parallel.stall_seconds
    with (
        StopRequest() as stop,
        Heartbeat(place, stall_seconds, heartbeat_file(config)) as heart,
    ):
        return _fit(stage, config, layout, stop, heart)


def _fit(
    stage: Stage, config: RunConfig, layout: Layout, stop: StopRequest, heart: Heartbeat
) -> bool:
    heart.at(0, "data")
    data = stop.run_alone(lambda: stage.build_dataset("train"))
    heldout = None
    if config.data.heldout:
        heldout = stop.run_alone(lambda: stage.build_dataset("heldout"))
    if stop.agreed(layout.device):
        return False
    heart.at(0, "model")
    resume_from = newest_checkpoint(config, layout)
    bare = stage.build_model(layout)
    _check_chunks(config, bare)
    if resume_from is None:
        _take_initial_weights(stage, bare, layout)
    chunks = wrap_model(bare, config)
    optimizer = build_optimizer(config, chunks)
    scheduler = build_lr_scheduler(config, optimizer)
    connect(chunks, optimizer, stage.remote_score)
    stragglers = Stragglers(chunks, layout, config.logging.log_interval)
    trace = DecoderTrace(config, layout, chunks, optimizer, stage.remote_score)

    checkpointer = Checkpointer(
        config, layout, unwrap_model(chunks), optimizer, scheduler, data.fingerprints()
    )
    progress, resumed = Progress(), None
    if resume_from is not None:
        resumed = resume(checkpointer, layout, resume_from)
        progress = resumed.progress

    writes = layout.rank == 0
    if writes:
        output_folder(config).mkdir(parents=True, exist_ok=True)
        (output_folder(config) / CONFIG_FILE).write_text(to_yaml(config))
    display = ProgressDisplay(config, progress.iteration, enabled=writes)
    metrics = MetricsWriter(config, progress.iteration, enabled=writes)
    _announce(display, resumed, bare)
    feed = BatchFeed(data, config, layout, start_sample=progress.consumed_train_samples)
    iterators = feed.chunk_iterators(len(chunks))
    reporter = Reporter(layout, stage.remote_score)
    for chunk in chunks:
        chunk.train()

    evaluations = Evaluations(stage, config, layout, chunks, heldout, metrics, display, stop)
    stopping = False
    try:
        heart.at(progress.iteration, "first batch")
        if resume_from is not None and evaluations.is_missing(progress.iteration):
            stopping = not evaluations.run(progress.iteration)
        if progress.iteration < config.training.train_iters and not stopping:
            stop.run_alone(feed.prepare)
            stopping = stop.agreed(layout.device)
        if stopping:
            display.say(f"asked to stop: still at iteration {progress.iteration}, nothing to save")
            return False
        while progress.iteration < config.training.train_iters and not stopping:
            heart.at(progress.iteration + 1, "training")
            started = time.perf_counter()
            stragglers.start()
            scheduler.step(1)
            with trace.over(progress.iteration + 1, iterators) as batches:
                update = train_step(
                    stage, config, layout, chunks, optimizer, feed, batches, reporter
                )
            seconds = time.perf_counter() - started
            _advance(progress, config, update)

            record = iteration_record(
                stage,
                config,
                update,
                iteration=progress.iteration,
                consumed_train_samples=progress.consumed_train_samples,
                bad_samples=progress.bad_samples,
                lr=scheduler.get_lr({}),
                seconds=seconds,
                layout=layout,
            )
            record |= stragglers.report(progress.iteration)
            metrics.iteration(record)
            _note_straggler(display, stragglers, record)
            display.step(progress.iteration, seconds, update.totals.losses, record)
            if not update.made:
                _note_skipped(display, progress, config)
            check_bad_images(progress.bad_samples, config.data.max_bad_images)

            checkpointer.poll()
            _note_trace(display, config, trace.write(only_all=True))
            stopping = stop.agreed(layout.device)
            heart.at(progress.iteration, "evaluation")
            if not stopping and evaluations.is_due(progress.iteration):
                stopping = not evaluations.run(progress.iteration)
            last = progress.iteration == config.training.train_iters
            if last or stopping or is_due(progress.iteration, config.checkpoint.save_interval):
                heart.at(progress.iteration, "saving")
                metrics.flush()
                with whole_parameters(chunks):
                    checkpointer.save(progress)
                display.say(f"iteration {progress.iteration} | checkpoint")
        checkpointer.wait()
        _note_trace(display, config, trace.write(only_all=False))
        if stopping:
            display.say(f"asked to stop: state of iteration {progress.iteration} is saved")
    finally:
        feed.close(wait=not stopping)
        metrics.close()
        display.close()
    return not stopping


def _check_chunks(config: RunConfig, bare: list[torch.nn.Module]) -> None:
    needed = config.parallel.virtual_pipeline_model_parallel_size or 1
    if len(bare) != needed:
        raise ConfigError(
            f"stage {config.stage} builds {len(bare)} model chunks per rank, "
            f"parallel.virtual_pipeline_model_parallel_size asks for {needed}"
        )


def _take_initial_weights(stage: Stage, bare: list[torch.nn.Module], layout: Layout) -> None:
    initial = stage.initial_weights()
    if initial is not None:
        source = find_checkpoint(Path(initial.path))
        load_weights(
            source,
            bare,
            checkpoint_metadata(layout),
            initial.absent,
            initial.unused,
            initial.stage,
        )


def _advance(progress: Progress, config: RunConfig, update: Update) -> None:
    progress.iteration += 1
    progress.consumed_train_samples += config.training.global_batch_size
    progress.bad_samples += update.totals.work.bad_samples
    progress.updates += int(update.made)
    progress.nonfinite_in_a_row = 0 if update.made else progress.nonfinite_in_a_row + 1


def _note_skipped(display: ProgressDisplay, progress: Progress, config: RunConfig) -> None:
    """Counts a skipped update in the log. Raises FloatingPointError at the configured limit."""
    limit = config.training.max_nonfinite_iters
    display.say(
        f"iteration {progress.iteration} | loss or gradient not finite, parameters kept "
        f"({progress.nonfinite_in_a_row} in a row, {limit} end the run)"
    )
    if progress.nonfinite_in_a_row >= limit:
        raise FloatingPointError(
            f"{progress.nonfinite_in_a_row} updates in a row had a loss or gradient that is not "
            "finite; lower optimizer.lr, or raise training.max_nonfinite_iters"
        )


def _note_straggler(
    display: ProgressDisplay, stragglers: Stragglers, record: dict[str, float | None]
) -> None:
    ratio = record.get("slowest_rank_ratio")
    if ratio is not None and ratio > SLOW_RATIO:
        rank = int(record["slowest_rank"])
        display.say(
            f"iteration {record['iteration']} | rank {rank} on {stragglers.nodes[rank]} takes "
            f"{ratio:.2f} x the median rank's time for its own work"
        )


def _note_trace(display: ProgressDisplay, config: RunConfig, was_written: bool) -> None:
    if was_written:
        display.say(f"trace of iteration {config.logging.trace_iteration}: {trace_file(config)}")


def _announce(
    display: ProgressDisplay, resumed: Resumed | None, bare: list[torch.nn.Module]
) -> None:
    trained = sum(p.numel() for chunk in bare for p in chunk.parameters() if p.requires_grad)
    held = sum(p.numel() for chunk in bare for p in chunk.parameters())
    display.say(f"rank 0 holds {held:,} parameters, {trained:,} of them train")
    if resumed is None:
        return
    for line in resumed.passed_over:
        display.say(line)
    display.say(f"resumed from {resumed.path} at iteration {resumed.progress.iteration}")
    for difference in resumed.differences:
        display.say(f"  differs from the checkpoint: {difference}")
