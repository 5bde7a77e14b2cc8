"""How far the whole quickstart is, and when it will be done, on a terminal or in a log.

Not megatron_kosmosg/progress.py, which divides what is done by one rate: here the steps are
of different kinds, and the time left comes from what each was expected to take.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

from quickstart.steps import Step

_LOG_EVERY = 20.0
"""Seconds between lines when the output is not a terminal."""
_TRUSTED_SHARE = 0.05
"""Share of a training that must have run before its own speed replaces the expected one."""
_TAIL_BYTES = 8192


def last_record(metrics: Path) -> dict:
    """The newest complete line of a metrics.jsonl, {} when there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    for line in reversed(lines[:-1]):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return {}


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from one hour on."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RemainingTime:
    """Time remaining over all steps. Expected times come from the steps, and are scaled by how
    fast this machine turned out to be in the steps that ran so far."""

    def __init__(self, steps: list[Step], stream: TextIO | None = None) -> None:
        self._steps = steps
        self._stream = sys.stdout if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._expected = 0.0
        self._measured = 0.0
        self._index = 0
        self._started = 0.0
        self._first_record: dict = {}
        self._anchor: tuple[float, float] | None = None
        self._last_line = 0.0

    def begin(self, index: int) -> None:
        """Step `index` starts now; a training may start in its middle."""
        self._index = index
        self._started = self._last_line = time.monotonic()
        self._first_record = self._record()
        self._anchor = None
        self._print(f"{self._label()} ...", keep=not self._is_terminal)

    def update(self) -> None:
        """Refresh the status line (terminal), or add a line every 20 seconds (log)."""
        now = time.monotonic()
        if not self._is_terminal and now - self._last_line < _LOG_EVERY:
            return
        self._last_line = now
        step_left, all_left = self.remaining(now)
        # The time first: a narrow terminal cuts the line at its end.
        times = f"{clock(all_left)} left (step {clock(step_left)})"
        parts = [f"{self._number()} {times}", self._step().title, *self._training_state()]
        self._print("  ".join(parts), keep=not self._is_terminal)

    def finish(self, seconds: float) -> None:
        """The current step is done after `seconds` of this run."""
        self._expected += self._step().seconds * (1.0 - self._share(self._first_record))
        self._measured += seconds
        self._print(f"{self._label()} done in {clock(seconds)}", keep=True)

    def reuse(self, index: int, note: str) -> None:
        """Step `index` was done by an earlier run."""
        self._index = index
        self._print(f"{self._label()} {note}", keep=True)

    def clear(self) -> None:
        """Leave the cursor on an empty line."""
        if self._is_terminal:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def remaining(self, now: float) -> tuple[float, float]:
        """Seconds until the end of (this step, all steps)."""
        elapsed = now - self._started
        slowness = self._measured / self._expected if self._expected > 20 else 1.0
        to_do = self._step().seconds * (1.0 - self._share(self._first_record))
        left = max(slowness * to_do - elapsed, 0.05 * slowness * to_do)
        share = self._share(self._new_record())
        if self._anchor is None and share > 0:
            self._anchor = (now, share)  # imports and the first iteration are behind
        elif self._anchor is not None and share - self._anchor[1] > _TRUSTED_SHARE:
            seconds_per_share = (now - self._anchor[0]) / (share - self._anchor[1])
            left = seconds_per_share * (1.0 - share)
            slowness = (elapsed + left) / max(to_do, 1.0)
        later = sum(step.seconds for step in self._steps[self._index + 1 :])
        return left, left + slowness * later

    def _record(self) -> dict:
        """Where the current training is by its metrics, {} for other steps."""
        step = self._step()
        return last_record(step.metrics) if step.metrics and step.iterations else {}

    def _new_record(self) -> dict:
        """The same, {} until this run has written something."""
        record = self._record()
        return {} if record == self._first_record else record

    def _share(self, record: dict) -> float:
        """Share of the current training that is done; 0 for other steps."""
        return min(record.get("iteration", 0) / (self._step().iterations or 1), 1.0)

    def _training_state(self) -> list[str]:
        record = self._new_record()
        if "iteration" not in record:
            return []
        state = [f"iteration {record['iteration']}/{self._step().iterations}"]
        if isinstance(record.get("loss"), float):
            state.append(f"loss {record['loss']:.4f}")
        return state

    def _step(self) -> Step:
        return self._steps[self._index]

    def _number(self) -> str:
        return f"[{self._index + 1}/{len(self._steps)}]"

    def _label(self) -> str:
        return f"{self._number()} {self._step().title}"

    def _print(self, text: str, keep: bool) -> None:
        if self._is_terminal:
            width = shutil.get_terminal_size().columns
            self._stream.write("\r\033[K" + (text if keep else text[: width - 1]))
        else:
            self._stream.write(text)
        if keep or not self._is_terminal:
            self._stream.write("\n")
        self._stream.flush()
