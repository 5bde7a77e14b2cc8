"""One progress line: rewritten in place on a terminal, once a minute in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from megatron_kosmosg.preprocess.counts import Counts

TERMINAL_SECONDS, LOG_SECONDS = 0.2, 60.0


class ProgressLine:
    """Prints counts, rate and remaining time to `stream`, None: stderr."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._started = self._printed = time.monotonic()

    def __call__(self, done: int, total: int, counts: Counts) -> None:
        """Reports `done` of `total` shards."""
        now = time.monotonic()
        interval = TERMINAL_SECONDS if self._is_terminal else LOG_SECONDS
        if done < total and now - self._printed < interval:
            return
        self._printed = now
        seconds = max(now - self._started, 1e-9)
        line = (
            f"{100 * done // total:3d}%  {counts.samples:,} samples  "
            f"{counts.samples / seconds:,.0f}/s  {counts.output_bytes / seconds / 1e6:.1f} MB/s  "
            f"{counts.rejects.total():,} rejected  {seconds * (total - done) / done:.0f} s left"
        )
        end = "\n" if done == total or not self._is_terminal else ""
        self._stream.write(("\r\x1b[K" if self._is_terminal else "") + line + end)
        self._stream.flush()
