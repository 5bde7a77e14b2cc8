"""Numbers of a run: throughput per iteration, `metrics.jsonl`, and what trackers are told.

One JSON line per iteration, one more for each evaluation (names start with `heldout_`), each with
`time` (seconds since 1970) and `wall_time` (since this start began to train). A number that is not
finite is written as null. A resumed run cuts the file back to its checkpoint first.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from megatron_kosmosg.config.paths import METRICS_FILE, output_folder
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.files import open_itself, write_text
from megatron_kosmosg.monitoring.trackers import Tracker, open_trackers
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.training.stage import Probe, Stage
from megatron_kosmosg.training.step import Update


def iteration_record(
    stage: Stage,
    config: RunConfig,
    update: Update,
    *,
    iteration: int,
    consumed_train_samples: int,
    bad_samples: int,
    lr: float,
    seconds: float,
    context: ParallelContext,
) -> dict[str, float | None]:
    """The line of one iteration.

    tflops: TFLOP/s of one device, from the work actually done without recomputation; mfu: its
    share of logging.peak_tflops; data_wait: share of the iteration spent waiting for data;
    padding: share of the decoder's positions that are padding (0 with data.pack_prompts);
    bad_samples: undecodable images since the first iteration, restarts included. With score ranks:
    decoder_idle and score_idle, shares of the iteration that a replica waited for the U-Net's
    answers and that a score rank waited for conditions (the latter also while the decoder updates,
    evaluates or saves, at most 1); link_mib, MiB to and from the score ranks; score_ranks, those
    that work for a replica now, mean over replicas; score_queue, requests that wait for one, of all
    replicas; score_latency, mean seconds from a request to its answer.
    """
    totals = update.totals
    flops = stage.flops_per_iteration(totals.work.tokens, totals.work.images, totals.work.rows)
    tflops = flops / seconds / context.num_devices / 1e12
    record = {
        "iteration": iteration,
        **{name: _finite(value) for name, value in totals.losses.items()},
        "lr": lr,
        "grad_norm": _finite(update.grad_norm),
        "samples_per_sec": config.training.global_batch_size / seconds,
        "tokens_per_sec": totals.work.tokens / seconds,
        "tflops": tflops,
        "mfu": tflops / config.logging.peak_tflops,
        "data_wait": totals.data_wait / seconds,
        "padding": totals.work.padding / totals.work.tokens,
        "consumed_train_samples": consumed_train_samples,
        "bad_samples": bad_samples,
    }
    if context.num_score_ranks:
        score = totals.score
        record["decoder_idle"] = score.waited / context.dp_size / seconds
        # Others may have joined, and some may be gone.
        working = max(1.0, score.ranks / context.dp_size)
        record["score_idle"] = min(1.0, score.idle / working / seconds)
        record["link_mib"] = score.num_bytes / 2**20
        record["score_ranks"] = score.ranks / context.dp_size
        record["score_queue"] = score.queued
        record["score_latency"] = score.latency
    return record


def cut_back(path: Path, iteration: int) -> None:
    """Drops the lines after `iteration`, and a last line that was cut off; atomic."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # half a line of a killed run
    write_text(path, "".join(kept), only_writer=True)


class MetricsWriter:
    """Writer of one rank; `enabled=False` makes every method do nothing."""

    def __init__(self, config: RunConfig, start_iteration: int, *, enabled: bool) -> None:
        self._began = time.perf_counter()
        self._file = None
        self._trackers: list[Tracker] = []
        if not enabled:
            return
        folder = output_folder(config)
        cut_back(folder / METRICS_FILE, start_iteration)
        self._file = open_itself(folder / METRICS_FILE, "a")
        self._trackers = open_trackers(config, start_iteration)

    def iteration(self, record: dict[str, float | None]) -> None:
        """Appends the line of one iteration to metrics.jsonl."""
        if self._file is not None:
            self._write(record, "train", int(record["iteration"] or 0))

    def evaluation(self, iteration: int, found: Probe) -> None:
        """Appends the line of one evaluation and shows its images."""
        if self._file is None:
            return
        if found.metrics:
            named = {_heldout(name): _finite(value) for name, value in found.metrics.items()}
            self._write({"iteration": iteration, **named}, "heldout", iteration)
        for tracker in self._trackers:
            for name, image in found.images.items():
                tracker.image(name, image, found.words.get(name, ()), iteration)

    def has_evaluation(self, iteration: int) -> bool:
        """Whether the file holds the line of this evaluation."""
        if self._file is None:
            return False
        lines = map(json.loads, Path(self._file.name).read_text().splitlines())
        return any(line["iteration"] == iteration and "lr" not in line for line in lines)

    def flush(self) -> None:
        """Returns when all lines so far are on disk, for checkpoints that count on them."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, record: dict[str, float | None], group: str, iteration: int) -> None:
        assert self._file is not None
        now = {
            "time": round(time.time(), 3),
            "wall_time": round(time.perf_counter() - self._began, 3),
        }
        self._file.write(json.dumps(record | now, allow_nan=False) + "\n")
        self._file.flush()
        values = {n: v for n, v in record.items() if n != "iteration" and v is not None}
        for tracker in self._trackers:
            tracker.numbers(group, values, iteration)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _heldout(name: str) -> str:
    return name if name.startswith("heldout_") else f"heldout_{name}"
