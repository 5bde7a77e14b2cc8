"""Named stretches of one rank's time, kept in memory until a trace of an iteration is written.

Schedules, pipeline exchange and optimizer are named through the timers that Megatron-Core calls
where a config has some. torch.profiler's Chrome export has no choice but every operator: 4 MB a
micro-batch for 24 layers, and it cannot show a wait that began before it was switched on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_kosmosg.parallel.devices import has_stream, timing_event

About = int | torch.Tensor
"""What a stretch worked on: a number, or a tensor of numbers whose least is meant, which is read
only when the trace is written: reading it earlier would stop a GPU."""
RecordSpan = Callable[..., AbstractContextManager[None]]
"""`with record("name", about=1):` names what happens inside; see Spans."""

SEND, WAIT = "send condition", "wait for answer"
"""What a decoder rank does with the score ranks, ..."""
AHEAD = "images ahead"
"""... and before it waits for them, ..."""
IDLE, UNET, REPLY = "idle", "U-Net", "send answer"
"""... and they."""

_NOTHING = contextlib.nullcontext()


def no_record(name: str, **about: About) -> AbstractContextManager[None]:
    """Keeps nothing: stands where no trace is asked for."""
    return _NOTHING


@dataclass
class Span:
    """One stretch of time with its name."""

    name: str
    about: dict[str, About]
    start: float
    """Seconds since the epoch, by this node's clock."""
    end: float = 0.0
    lane: str = "program"
    """`program`: time of the Python program; `GPU`: of the work that it put on the GPU's stream."""
    marks: list[torch.Event] = field(default_factory=list)
    """Where the same stretch begins and ends on the GPU."""


class Spans:
    """Recorder of one rank: a context manager for each stretch, nested ones inside."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = has_stream(device)
        self._spans: list[Span] = []

    @contextlib.contextmanager
    def __call__(self, name: str, **about: About) -> Iterator[None]:
        """Context whose time is recorded under `name`."""
        span = self.begin(name, **about)
        try:
            yield
        finally:
            self.end(span)

    def begin(self, name: str, **about: About) -> Span:
        """Begins a stretch, which `end` ends."""
        span = Span(name, about, time.time())
        self._spans.append(span)
        self._mark(span)
        return span

    def end(self, span: Span) -> None:
        """Ends a stretch that `begin` began."""
        self._mark(span)
        span.end = time.time()

    def over(self, items: Iterator[Any], name: str) -> Iterator[Any]:
        """The same items; the time of getting each of them is recorded."""
        while True:
            with self(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def clear(self) -> None:
        """Forgets all stretches."""
        self._spans.clear()

    def finished(self) -> list[Span]:
        """All stretches that have ended, on a GPU those of its stream as well."""
        ended = [span for span in self._spans if span.end]
        for span in ended:
            span.about = {key: _least(value) for key, value in span.about.items()}
        return ended + (self._of_gpu(ended) if self._on_gpu else [])

    def _mark(self, span: Span) -> None:
        if self._on_gpu:
            mark = timing_event()
            mark.record()
            span.marks.append(mark)

    @staticmethod
    def _of_gpu(spans: list[Span]) -> list[Span]:
        """The stretches by the GPU's clock, of which one instant is known by the node's, too."""
        known = timing_event()
        known.record()
        known.synchronize()
        now = time.time()

        def at(mark: torch.Event) -> float:
            return now - mark.elapsed_time(known) / 1000

        return [Span(s.name, s.about, at(s.marks[0]), at(s.marks[1]), "GPU") for s in spans]


def _least(value: About) -> int:
    return int(value.min()) if isinstance(value, torch.Tensor) else value


class MegatronTimers:
    """Stands for what Megatron-Core calls `timers`; it records stretches instead of sums."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """The timer of that name, Megatron-Core's. log_level: how fine it is; all are kept."""
        return self._timers.setdefault(name, _Timer(self._spans, name))


class _Timer:
    NUMBERED = {"forward-compute": "forward", "backward-compute": "backward"}
    """Begin once for each micro-batch (and model chunk)."""

    def __init__(self, spans: Spans, name: str) -> None:
        self._spans, self._name = spans, name
        self._count = 0
        self._open: Span | None = None

    def start(self, barrier: bool = False) -> None:
        """Begins a stretch. `barrier` is Megatron-Core's wish that ranks wait for each other; it is
        not granted, because waiting would change what is looked at."""
        about = {}
        if self._name in self.NUMBERED:
            about["micro_batch"] = self._count
            self._count += 1
        self._open = self._spans.begin(self.NUMBERED.get(self._name, self._name), **about)

    def stop(self, barrier: bool = False) -> None:
        assert self._open is not None, f"timer {self._name} was not started"
        self._spans.end(self._open)
        self._open = None
