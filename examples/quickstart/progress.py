"""How far the whole quickstart is, and when it will be done, on a terminal or in a log."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

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


class Progress:
    """Time remaining over all steps. Expected times come from the steps, and are scaled by how
    fast this machine turned out to be in the steps that ran so far."""

    def __init__(self, steps: list[Step], stream=sys.stdout) -> None:
        self._steps = steps
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._expected = 0.0
        self._measured = 0.0
        self._index = 0
        self._started = 0.0
        self._first_share = 0.0
        self._last_line = 0.0

    def begin(self, index: int) -> None:
        """Step `index` starts now; a training may start in its middle."""
        self._index = index
        self._started = self._last_line = time.monotonic()
        self._first_share = self._share(self._steps[index])
        self._say(f"{self._label()} ...", keep=not self._is_terminal)

    def update(self) -> None:
        """Refresh the status line (terminal), or add a line every 20 seconds (log)."""
        now = time.monotonic()
        if not self._is_terminal and now - self._last_line < _LOG_EVERY:
            return
        self._last_line = now
        step_left, all_left = self.remaining(now)
        parts = [self._label(), *self._training_state()]
        parts += [f"step {clock(step_left)} left", f"all {clock(all_left)} left"]
        self._say("  ".join(parts), keep=not self._is_terminal)

    def finish(self, seconds: float) -> None:
        """The current step is done after `seconds` of this run."""
        step = self._steps[self._index]
        self._expected += step.seconds * (1.0 - self._first_share)
        self._measured += seconds
        self._say(f"{self._label()} done in {clock(seconds)}", keep=True)

    def reuse(self, index: int, note: str) -> None:
        """Step `index` was done by an earlier run."""
        self._index = index
        self._say(f"{self._label()} {note}", keep=True)

    def clear(self) -> None:
        """Leave the cursor on an empty line."""
        if self._is_terminal:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def remaining(self, now: float) -> tuple[float, float]:
        """Seconds until the end of (this step, all steps)."""
        step = self._steps[self._index]
        elapsed = now - self._started
        slowness = self._measured / self._expected if self._expected > 20 else 1.0
        share = self._share(step)
        if share - self._first_share > _TRUSTED_SHARE:
            left = elapsed * (1.0 - share) / (share - self._first_share)
            slowness = (elapsed + left) / (step.seconds * (1.0 - self._first_share))
        else:
            expected = step.seconds * slowness * (1.0 - self._first_share)
            left = max(expected - elapsed, 0.05 * expected)
        later = sum(other.seconds for other in self._steps[self._index + 1 :])
        return left, left + slowness * later

    def _share(self, step: Step) -> float:
        if step.metrics is None or not step.iterations:
            return 0.0
        return min(last_record(step.metrics).get("iteration", 0) / step.iterations, 1.0)

    def _training_state(self) -> list[str]:
        step = self._steps[self._index]
        record = last_record(step.metrics) if step.metrics else {}
        if "iteration" not in record:
            return []
        state = [f"iteration {record['iteration']}/{step.iterations}"]
        if isinstance(record.get("loss"), float):
            state.append(f"loss {record['loss']:.4f}")
        return state

    def _label(self) -> str:
        return f"[{self._index + 1}/{len(self._steps)}] {self._steps[self._index].title}"

    def _say(self, text: str, keep: bool) -> None:
        if self._is_terminal:
            width = shutil.get_terminal_size().columns
            self._stream.write("\r\033[K" + (text if keep else text[: width - 1]))
        else:
            self._stream.write(text)
        if keep or not self._is_terminal:
            self._stream.write("\n")
        self._stream.flush()
