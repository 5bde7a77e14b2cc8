"""What a person sees while a run goes on: a line per interval, and a bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections import deque

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.progress import Progress

WINDOW = 50
"""Iterations whose mean duration predicts the time remaining."""


class ProgressDisplay:
    """Printer of one rank; `enabled=False` makes every method silent."""

    def __init__(self, config: RunConfig, start_iteration: int, *, enabled: bool) -> None:
        self._enabled = enabled
        self._total = config.training.train_iters
        self._interval = config.logging.log_interval
        self._recent: deque[float] = deque(maxlen=WINDOW)
        # A log has the lines of `step` already.
        self._bar = Progress(config.stage, is_shown=enabled and sys.stderr.isatty())
        self._bar(start_iteration, self._total)

    def log(self, text: str) -> None:
        """Prints one line above the progress bar."""
        if self._enabled:
            self._bar.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def step(
        self,
        iteration: int,
        seconds: float,
        losses: dict[str, float],
        record: dict[str, float | None],
    ) -> None:
        """Counts one iteration of `seconds`; prints a line when the interval is full."""
        if not self._enabled:
            return
        self._recent.append(seconds)
        self._bar(iteration, self._total, f"loss={losses['loss']:.4g}")
        if iteration % self._interval and iteration != self._total:
            return
        parts = [f"{name} {value:.4g}" for name, value in losses.items() if name != "loss"]
        inside = f" ({', '.join(parts)})" if parts else ""
        norm = record["grad_norm"]
        self.log(
            f"iteration {iteration}/{self._total} | loss {losses['loss']:.4f}{inside}"
            f" | lr {record['lr']:.3g}"
            f" | grad norm {'not finite' if norm is None else f'{norm:.3g}'}"
            f" | {record['samples_per_sec']:.1f} samples/s, {record['tokens_per_sec']:.0f} tokens/s"
            f" | {record['tflops']:.3g} TFLOP/s | data wait {record['data_wait']:.1%}"
            f" | padding {record['padding']:.1%}"
            f"{_score_part(record)} | {self._remaining(iteration)} left"
        )

    def close(self) -> None:
        self._bar.close()

    def _remaining(self, iteration: int) -> str:
        mean = sum(self._recent) / len(self._recent)
        seconds = round((self._total - iteration) * mean)
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _score_part(record: dict[str, float | None]) -> str:
    if "link_mib" not in record:
        return ""
    return (
        f" | idle: decoder {record['decoder_idle']:.1%}, score {record['score_idle']:.1%}"
        f" | link {record['link_mib']:.3g} MiB"
    )
