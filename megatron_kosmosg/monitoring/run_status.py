"""The state of a run, read from its folder alone: by whoever can read it, from any machine."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_kosmosg.config.errors import ConfigError, InputError
from megatron_kosmosg.config.load import load_saved_config
from megatron_kosmosg.config.paths import (
    COMPLETE_FILE,
    FAILURE_FILE,
    METRICS_FILE,
)
from megatron_kosmosg.foreign_files import read_json
from megatron_kosmosg.monitoring.fleet_size import answers_in, hardware_in_words, size_advice
from megatron_kosmosg.monitoring.lost_ranks import latest_start, lost_in_words, lost_ranks
from megatron_kosmosg.monitoring.run_owner import (
    OWNER_FILE,
    STALE_SECONDS,
    Holder,
)

TAIL_BYTES = 256 << 10
"""Of metrics.jsonl: hundreds of iterations, of a file that may have hundreds of thousands."""
_RECENT = 50
"""Iterations whose mean duration predicts the time remaining."""
_GIB = 2**30


@dataclass(frozen=True)
class RunStatus:
    folder: str
    stage: str
    state: str
    """starting, running, stalled, silent (owned, without a sign of life), failed, stopped, done."""
    iteration: int
    train_iters: int
    phase: str | None
    heartbeat_seconds: float | None
    """Since the latest sign of life."""
    stall: str | None
    loss: float | None
    samples_per_sec: float | None
    seconds_left: float | None
    """At the speed of the latest iterations, evaluations and saves between them included."""
    checkpoint: str | None
    """The newest whole one."""
    checkpoint_gib: float | None
    free_gib: float
    """On the disk of the checkpoints."""
    score_ranks: str | None
    """Whether they are too many or too few, by the latest iterations."""
    answered_by: str | None
    """The kinds of hardware that gave the latest answers of score ranks."""
    lost_ranks: tuple[str, ...]
    """Score ranks of the job without which the latest start goes on, or went on."""
    owner: str | None
    error: str | None
    """Last line of the first error of the latest start that failed."""

    @property
    def is_well(self) -> bool:
        """Whether all is well, so that nobody has to look after the run."""
        return self.state in ("starting", "running", "done")


def run_status(folder: Path) -> RunStatus:
    """The status of the run in `folder`, which needs not be this machine's. Raises InputError where
    there is none."""
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        owner = _owner(folder)
        raise InputError(
            f"{folder} is no folder of a run: it has no config.yaml"
            + (f"; {owner} has begun to start one" if owner else "")
        )
    try:
        config = load_saved_config(config_file)
    except ConfigError as error:
        raise InputError(str(error)) from None
    heartbeat = _json(folder / "heartbeat.json")
    train, speed = _recent_iterations(folder / METRICS_FILE)
    last = train[-1] if train else {}
    iteration = int(last.get("iteration", 0))
    total = config.training.train_iters
    save = Path(config.checkpoint.save or folder / "checkpoints")
    save = save if save.is_dir() else folder
    newest = _newest_checkpoint(save)
    owner, error = _owner(folder), _error(folder / FAILURE_FILE)
    answers = sum((Counter(answers_in(line)) for line in train), Counter())
    age = None
    if isinstance(heartbeat.get("time"), (int, float)):
        age = max(
            0.0, time.time() - heartbeat["time"]
        )  # the run's node may have a clock that is ahead
    return RunStatus(
        folder=str(folder),
        stage=config.stage,
        state=_state(owner, age, heartbeat.get("stall"), error, iteration, total, newest),
        iteration=iteration,
        train_iters=total,
        phase=heartbeat.get("phase") if owner else None,
        heartbeat_seconds=age,
        stall=heartbeat.get("stall") if owner else None,
        loss=last.get("loss"),
        samples_per_sec=last.get("samples_per_sec"),
        seconds_left=None if speed is None else max(0, total - iteration) * speed,
        checkpoint=None if newest is None else newest.name,
        checkpoint_gib=None if newest is None else _size(newest) / _GIB,
        free_gib=shutil.disk_usage(save).free / _GIB,
        score_ranks=size_advice(train[-_RECENT:]),
        answered_by=hardware_in_words(answers) if answers else None,
        lost_ranks=tuple(lost_ranks(folder, latest_start(folder))),
        owner=owner,
        error=error,
    )


def to_text(status: RunStatus) -> str:
    """The status in lines for people; what is not known is left out."""
    share = status.iteration / status.train_iters
    lines = [
        f"{status.stage} in {status.folder}: {status.state}",
        f"iteration {status.iteration:,} of {status.train_iters:,} ({share:.1%})"
        + (f", {_duration(status.seconds_left)} left" if status.seconds_left else ""),
    ]
    if status.loss is not None and status.samples_per_sec is not None:
        lines.append(f"loss {status.loss:.4f}, {status.samples_per_sec:.1f} samples/s")
    if status.heartbeat_seconds is not None:
        doing = f" ({status.phase})" if status.phase else ""
        lines.append(f"sign of life {_duration(status.heartbeat_seconds)} ago{doing}")
    kept = "no checkpoint yet"
    if status.checkpoint is not None:
        kept = f"newest checkpoint {status.checkpoint} ({status.checkpoint_gib:.2f} GiB)"
    lines.append(f"{kept}, {status.free_gib:.1f} GiB free")
    for what, text in (
        ("score ranks", status.score_ranks),
        ("answered by", status.answered_by),
        ("lost", lost_in_words(status.lost_ranks, status.folder, is_running=bool(status.owner))),
        ("owner", status.owner),
        ("stall", status.stall),
        ("last error", status.error),
    ):
        if text:
            lines.append(f"{what}: {text}")
    return "\n".join(lines)


def to_json(status: RunStatus) -> str:
    """All of it as JSON on one line; null for what is not known."""
    return json.dumps(asdict(status))


def _state(
    owner: str | None,
    age: float | None,
    stall: object,
    error: str | None,
    iteration: int,
    total: int,
    newest: Path | None,
) -> str:
    if owner is not None:
        if age is None or (age > STALE_SECONDS and iteration == 0):
            return "starting"
        if age > STALE_SECONDS:
            return "silent"
        return "stalled" if stall else "running"
    if error is not None:
        return "failed"
    is_saved = newest is not None and newest.name == f"iter_{total:07d}"
    return "done" if iteration >= total and is_saved else "stopped"


def _recent_iterations(path: Path) -> tuple[list[dict[str, Any]], float | None]:
    """The latest lines of iterations, of one start, and their mean seconds."""
    lines: list[dict[str, Any]] = []
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return [], None
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # cut off: the first of the tail, or one that is being written
        if isinstance(found, dict) and "lr" in found and isinstance(found.get("iteration"), int):
            if lines and found.get("wall_time", 0) < lines[-1].get("wall_time", 0):
                lines = []  # a new start begins here
            lines.append(found)
    timed = [line for line in lines[-_RECENT:] if isinstance(line.get("time"), (int, float))]
    if len(timed) < 2:
        return lines, None
    iterations = timed[-1]["iteration"] - timed[0]["iteration"]
    return lines, (timed[-1]["time"] - timed[0]["time"]) / max(1, iterations)


def _newest_checkpoint(save: Path) -> Path | None:
    whole = [path.parent for path in save.glob(f"iter_*/{COMPLETE_FILE}")]
    return max((path for path in whole if path.name[5:].isdigit()), default=None)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _owner(folder: Path) -> str | None:
    found = _json(folder / OWNER_FILE)
    try:
        return str(Holder(**found)) if found else None
    except TypeError:
        return f"whoever wrote {OWNER_FILE}"


def _error(path: Path) -> str | None:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return None
    return lines[-1] if lines else f"{path.name} is empty"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
