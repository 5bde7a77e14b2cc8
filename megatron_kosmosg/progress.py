"""How far long work is, and the time left: a bar on a terminal, a line now and then in a log.

Everything that shows this goes through here; what is shown around the bar, such as the losses of a
training, is its caller's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

from megatron_kosmosg.terminal_text import printable_lines

TERMINAL_SECONDS, LOG_SECONDS = 0.2, 30.0
"""Least time between two states of the bar, and between two lines."""

_LINE = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}"

ProgressCallback = Callable[[int, int], None]
"""What long work calls with (done, in all), first with what is done before it begins."""


class Progress:
    """Shows how far work is. Call it with (done, in all) as often as is convenient: it is a
    ProgressCallback.

    The first call starts the clock, and what is done by then does not count for the rate. The work
    ends when all is done; a further call begins the next, of another size. What there is in all may
    grow on the way; where there is nothing to do, nothing is shown.
    """

    def __init__(
        self,
        name: str = "",
        unit: str = "it",
        *,
        stream: TextIO | None = None,
        is_shown: bool = True,
        is_shared: bool = False,
        delay: float = 0.0,
    ) -> None:
        """unit: of what is counted, in the singular; B (bytes) is shown with k, M and G.

        Args:
            stream: None is stderr.
            is_shared: other processes write to it, too, which get lines on a terminal as well.
            delay: work that is over within so many seconds shows nothing.
        """
        self._name, self._unit, self._stream = name, unit, stream
        self._is_shown, self._is_shared, self._delay = is_shown, is_shared, delay
        self._display: _Bar | _Lines | None = None
        self.total = 0
        """Of the latest call."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Shows that `done` of `total` are done. `note` says what else is worth knowing now, behind
        the time left."""
        self.total = total
        if not self._is_shown or total == 0:
            return
        if self._display is None:
            self._display = self._begin(done, total)
        self._display.show(done, total, note)
        if done >= total:
            self.close()

    def write(self, text: str) -> None:
        """Lines on stdout, above the bar; control characters in them are spelt out."""
        text = printable_lines(text)
        if isinstance(self._display, _Bar):
            _QuietBar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """What follows begins a line of its own, wherever the work is; harmless without work."""
        if self._display is not None:
            self._display.close()
            self._display = None

    def _begin(self, done: int, total: int) -> _Bar | _Lines:
        stream = sys.stderr if self._stream is None else self._stream
        kind = _Bar if stream.isatty() and not self._is_shared else _Lines
        return kind(self._name, self._unit, stream, self._delay, done, total)


class _QuietBar(tqdm):
    monitor_interval = 0
    """No thread of its own: there are workers that are forked while a bar is shown."""


class _Bar:
    """Rewritten in place; the first state is shown at once."""

    def __init__(
        self, name: str, unit: str, stream: TextIO, delay: float, done: int, total: int
    ) -> None:
        self._bar = _QuietBar(
            total=total,
            initial=done,
            desc=name or None,
            unit=unit,
            unit_scale=unit == "B",
            file=stream,
            mininterval=TERMINAL_SECONDS,
            dynamic_ncols=True,
            delay=delay,
        )

    def show(self, done: int, total: int, note: str) -> None:
        self._bar.total = total
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """Whole lines, the first when LOG_SECONDS have passed, and one at the end."""

    def __init__(
        self, name: str, unit: str, stream: TextIO, delay: float, done: int, total: int
    ) -> None:
        self._name, self._unit, self._stream, self._delay = name, unit, stream, delay
        self._initial = done
        self._started = self._printed = time.monotonic()

    def show(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        is_end = done >= total and now - self._started >= self._delay
        if not is_end and now - self._printed < LOG_SECONDS:
            return
        self._printed = now
        line = tqdm.format_meter(
            done,
            total,
            now - self._started,
            prefix=self._name,
            unit=self._unit,
            unit_scale=self._unit == "B",
            bar_format=_LINE,
            postfix=note,
            initial=self._initial,
        )
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Does nothing, because every line is ended already."""
