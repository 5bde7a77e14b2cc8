"""What a run says of itself beside its numbers: how it began, what it skipped, who was slow."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_kosmosg.checkpoint.newest import Resumed
from megatron_kosmosg.checkpoint.save_and_resume import TrainingProgress
from megatron_kosmosg.config.paths import trace_file
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.monitoring.stragglers import Stragglers
from megatron_kosmosg.score.hardware_mix import HardwareMix
from megatron_kosmosg.training.run_display import ProgressDisplay

SLOW_RATIO = 1.5
"""A slowest rank above this multiple of the median is worth a line."""


def note_skipped(display: ProgressDisplay, progress: TrainingProgress, config: RunConfig) -> None:
    """Counts a skipped update in the log. Raises FloatingPointError at the configured limit."""
    limit = config.training.max_nonfinite_iters
    display.log(
        f"iteration {progress.iteration} | loss or gradient not finite, parameters kept "
        f"({progress.nonfinite_in_a_row} in a row, {limit} end the run)"
    )
    if progress.nonfinite_in_a_row >= limit:
        raise FloatingPointError(
            f"{progress.nonfinite_in_a_row} updates in a row had a loss or gradient that is not "
            "finite; lower optimizer.lr, or raise training.max_nonfinite_iters"
        )


LAST_UPDATES = 5
"""So many updates, or all of a shorter run, that are not finite are no end of a training."""


def refuse_nonfinite_end(progress: TrainingProgress, config: RunConfig) -> None:
    """Raises FloatingPointError for a finished run whose last updates were all left out."""
    if progress.nonfinite_in_a_row >= min(LAST_UPDATES, config.training.train_iters):
        raise FloatingPointError(
            f"the last {progress.nonfinite_in_a_row} updates had a loss or gradient that is not "
            "finite, so the run has not ended well; its last parameters are saved. Lower "
            "optimizer.lr and go on from a checkpoint before iteration "
            f"{progress.iteration - progress.nonfinite_in_a_row + 1}"
        )


def note_straggler(
    display: ProgressDisplay, stragglers: Stragglers, record: dict[str, float | None]
) -> None:
    """Names the slowest rank of an interval where it is far behind the median."""
    ratio, slowest = record.get("slowest_rank_ratio"), record.get("slowest_rank")
    if ratio is not None and slowest is not None and ratio > SLOW_RATIO:
        rank = int(slowest)
        display.log(
            f"iteration {record['iteration']} | rank {rank} on {stragglers.nodes[rank]} takes "
            f"{ratio:.2f} x the median rank's time for its own work"
        )


def note_hardware(
    display: ProgressDisplay, hardware: HardwareMix, record: dict[str, float | None]
) -> None:
    """Names the kinds of hardware that answered in an interval, where there are several."""
    if (news := hardware.news(record)) is not None:
        display.log(f"iteration {record['iteration']} | {news}")


def note_trace(display: ProgressDisplay, config: RunConfig, was_written: bool) -> None:
    """Says where the trace is, once it has been written."""
    if was_written:
        display.log(f"trace of iteration {config.logging.trace_iteration}: {trace_file(config)}")


def announce(
    display: ProgressDisplay, resumed: Resumed | None, modules: Sequence[torch.nn.Module]
) -> None:
    """The first lines of a start: what rank 0 holds, and what the run goes on from."""
    trained = sum(p.numel() for chunk in modules for p in chunk.parameters() if p.requires_grad)
    held = sum(p.numel() for chunk in modules for p in chunk.parameters())
    display.log(f"rank 0 holds {held:,} parameters, {trained:,} of them train")
    if resumed is None:
        return
    for line in resumed.passed_over:
        display.log(line)
    display.log(f"resumed from {resumed.path} at iteration {resumed.progress.iteration}")
    for difference in resumed.differences:
        display.log(f"  differs from the checkpoint: {difference}")
