"""The training loop: restore, iterate, log, evaluate, save, stop. It never asks which stage runs.

Everything that a run does over its life is in `_fit`, in order; the file is long because of it.
"""

from __future__ import annotations

import time

from megatron_kosmosg.checkpoint.folder import CONFIG_FILE
from megatron_kosmosg.checkpoint.newest import newest_checkpoint, resume
from megatron_kosmosg.checkpoint.rng_state import restore_rng_state, rng_state
from megatron_kosmosg.checkpoint.save_and_resume import (
    Checkpointer,
    TrainingProgress,
)
from megatron_kosmosg.config.load import to_yaml
from megatron_kosmosg.config.paths import heartbeat_file, output_folder
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.bad_images import check_bad_images
from megatron_kosmosg.files import write_text
from megatron_kosmosg.launcher import find_rank_info
from megatron_kosmosg.monitoring.iteration_trace import DecoderTrace
from megatron_kosmosg.monitoring.run_owner import RunOwner
from megatron_kosmosg.monitoring.signals import StopRequest
from megatron_kosmosg.monitoring.stragglers import Stragglers
from megatron_kosmosg.monitoring.watchdog import Watchdog
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.score.hardware_mix import HardwareMix
from megatron_kosmosg.training.against_plan import AgainstPlan, PlannedRun
from megatron_kosmosg.training.batches import BatchFeed
from megatron_kosmosg.training.evaluation import Evaluations, is_due
from megatron_kosmosg.training.metrics import MetricsWriter, iteration_record
from megatron_kosmosg.training.run_display import ProgressDisplay
from megatron_kosmosg.training.run_notes import (
    announce,
    note_hardware,
    note_skipped,
    note_straggler,
    note_trace,
    refuse_nonfinite_end,
)
from megatron_kosmosg.training.setup import build_trained
from megatron_kosmosg.training.stage import Stage
from megatron_kosmosg.training.step import Reporter, Update, train_step
from megatron_kosmosg.training.wrapping import whole_parameters


def fit(
    stage: Stage,
    config: RunConfig,
    context: ParallelContext,
    owner: RunOwner | None = None,
    planned: PlannedRun | None = None,
) -> bool:
    """Trains until the config's last iteration or until a signal asks to stop.

    Collective over the decoder ranks, whose groups exist (`parallel.platform.initialize`).

    Args:
        stage: what is trained, as `build_stage` gives it.
        context: this rank's place, as `initialize` gives it.
        owner: on rank 0 its claim on the run's folder.
        planned: on rank 0 the plan that measured speed and memory are compared with.

    Returns:
        True when all iterations are done, False when it stopped before and its state is saved.

    Raises:
        ConfigError: the config, its data or its checkpoint cannot be used; the message says why.
        RunFolderTaken: another run has taken the folder of this one.
        FloatingPointError, TooManyBadImages: the run has met more than the config allows.
    """
    rank_info, stall_seconds = find_rank_info(), config.parallel.stall_seconds
    with (
        StopRequest() as stop,
        Watchdog(rank_info, stall_seconds, heartbeat_file(config)) as watchdog,
    ):
        against_plan = AgainstPlan(planned, config.training.global_batch_size, context.device)
        return _fit(stage, config, context, stop, watchdog, owner, against_plan)


def _fit(
    stage: Stage,
    config: RunConfig,
    context: ParallelContext,
    stop: StopRequest,
    watchdog: Watchdog,
    owner: RunOwner | None,
    against_plan: AgainstPlan,
) -> bool:
    # What is read. An index may take long to build: a stop does not wait for it.
    watchdog.at(0, "data")
    data = stop.run_alone(lambda: stage.build_dataset("train"))
    heldout = None
    if config.data.heldout:
        heldout = stop.run_alone(lambda: stage.build_dataset("heldout"))
    if stop.agreed(context.device):
        return False
    assert data is not None  # only a stop leaves it out
    # What is trained: from the newest checkpoint, else from the stage's initial weights.
    watchdog.at(0, "model")
    # Before the model is built: a run that is resumed need not read the weights it began from.
    resume_from = newest_checkpoint(config, context)
    trained = build_trained(stage, config, context, takes_initial_weights=resume_from is None)
    chunks, optimizer, scheduler = trained.chunks, trained.optimizer, trained.scheduler
    # It wraps the end of the backward passes, which `build_trained` has connected.
    stragglers = Stragglers(chunks, context, config.logging.log_interval)
    trace = DecoderTrace(config, context, chunks, optimizer, stage.remote_score)

    checkpointer = Checkpointer(
        config,
        context,
        trained.modules,
        optimizer,
        scheduler,
        data.fingerprints(),
        trained.average,
        trained.initial_from,
    )
    progress, resumed = TrainingProgress(), None
    if resume_from is not None:
        resumed = resume(checkpointer, context, resume_from)
        progress = resumed.progress

    # What is told. Files of an earlier start are cut back to the checkpoint, so this comes after
    # it is known which one could be read.
    writes = context.rank == 0
    if writes:
        output_folder(config).mkdir(parents=True, exist_ok=True)
        write_text(output_folder(config) / CONFIG_FILE, to_yaml(config), only_writer=True)
    display = ProgressDisplay(config, progress.iteration, enabled=writes)
    metrics = MetricsWriter(config, progress.iteration, enabled=writes)
    announce(display, resumed, trained.modules)
    feed = BatchFeed(
        data,
        config,
        context,
        start_sample=progress.consumed_train_samples,
        num_updates=config.training.train_iters - progress.iteration,
    )
    iterators = feed.chunk_iterators(len(chunks))
    reporter = Reporter(context, stage.remote_score)
    for chunk in chunks:
        chunk.train()

    evaluations = Evaluations(stage, config, context, chunks, heldout, metrics, display, stop)
    stopping, saved = False, progress.iteration
    hardware = HardwareMix(config, context)

    def save() -> None:
        watchdog.at(progress.iteration, "saving")
        # A checkpoint promises that the lines up to its iteration are there.
        metrics.flush()
        with whole_parameters(chunks):
            checkpointer.save(progress)
        display.log(f"iteration {progress.iteration} | checkpoint")

    try:
        # An evaluation that a stop cut short is made up for before training goes on.
        watchdog.at(progress.iteration, "first batch")
        if resume_from is not None and evaluations.is_missing(progress.iteration):
            stopping = not evaluations.run(progress.iteration)
        if progress.iteration < config.training.train_iters and not stopping:
            stop.run_alone(feed.prepare)
            stopping = stop.agreed(context.device)
        if stopping:
            display.log(f"asked to stop: still at iteration {progress.iteration}, nothing to save")
            return False
        while progress.iteration < config.training.train_iters and not stopping:
            watchdog.at(progress.iteration + 1, "training")
            started = time.perf_counter()
            stragglers.start()
            # Only where an iteration can be taken back: without score ranks none is.
            before = rng_state() if context.num_score_ranks else {}
            # Before the update: the first takes iteration 1's rate and not the warm-up's zero.
            scheduler.step(1)
            with trace.over(progress.iteration + 1, iterators) as batches:
                update = train_step(
                    *(stage, config, context, chunks, optimizer, feed, batches, reporter),
                    trained.average,
                )
            if update.totals.score.unanswered:
                # As if this iteration had not begun: the rerun makes it.
                scheduler.step(-1)
                restore_rng_state(before)
                display.log("no score rank is left, and none came")
                stopping = True
                if progress.iteration > saved:
                    save()
                break
            seconds = time.perf_counter() - started
            _advance(progress, config, update)
            if owner is not None:
                owner.check()  # before anything of this iteration is written

            record = iteration_record(
                stage,
                config,
                update,
                iteration=progress.iteration,
                consumed_train_samples=progress.consumed_train_samples,
                bad_samples=progress.bad_samples,
                lr=scheduler.get_lr({}),
                seconds=seconds,
                context=context,
            )
            record |= stragglers.report(progress.iteration)
            if writes:
                record |= hardware.report(progress.iteration)
            metrics.iteration(record)
            note_straggler(display, stragglers, record)
            note_hardware(display, hardware, record)
            display.step(progress.iteration, seconds, update.totals.losses, record)
            if (compared := against_plan.after(seconds)) is not None:
                display.log(compared)
            # After the line is written: what ends the run here has its numbers on disk.
            if not update.made:
                note_skipped(display, progress, config)
            check_bad_images(progress.bad_samples, config.data.max_bad_images)

            # The ranks agree to stop, then evaluate unless they stop, then save if it is time: the
            # time that a signal leaves is for saving, and an evaluation can be made up for.
            checkpointer.poll()
            note_trace(display, config, trace.write(only_all=True))
            stopping = stop.agreed(context.device)
            watchdog.at(progress.iteration, "evaluation")
            if not stopping and evaluations.is_due(progress.iteration):
                stopping = not evaluations.run(progress.iteration)
            last = progress.iteration == config.training.train_iters
            if last or stopping or is_due(progress.iteration, config.checkpoint.save_interval):
                save()
                saved = progress.iteration
        checkpointer.wait()
        note_trace(display, config, trace.write(only_all=False))
        if stopping:
            display.log(f"asked to stop: state of iteration {progress.iteration} is saved")
        elif progress.iteration >= config.training.train_iters:
            refuse_nonfinite_end(progress, config)
    finally:
        # A stop does not wait for reads under way, which may take long.
        feed.close(wait=not stopping)
        metrics.close()
        display.close()
    return not stopping


def _advance(progress: TrainingProgress, config: RunConfig, update: Update) -> None:
    progress.iteration += 1
    progress.consumed_train_samples += config.training.global_batch_size
    progress.bad_samples += update.totals.work.bad_samples
    progress.updates += int(update.made)
    progress.nonfinite_in_a_row = 0 if update.made else progress.nonfinite_in_a_row + 1
