"""Progress of a long pass over a dataset in a log: one line a minute, and one at the end."""

from __future__ import annotations

import sys
import time
from typing import TextIO

SECONDS = 60.0


class MinuteLines:
    """Call it with (samples done, in all); prints to `stream`, None: stderr."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self._name, self._stream = name, sys.stderr if stream is None else stream
        self._started = self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Prints `done`, the rate and the time left when a line is due."""
        now = time.monotonic()
        if done < total and now - self._printed < SECONDS:
            return
        self._printed = now
        rate = done / max(now - self._started, 1e-9)
        left = f"{(total - done) / rate:.0f} s left" if rate else ""
        line = f"{self._name}: {done:,} of {total:,}, {rate:,.1f}/s, {left}"
        print(line, file=self._stream, flush=True)
