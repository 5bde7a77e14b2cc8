"""`trace.json`: what every rank did in one iteration, in Chrome's trace event format.

A process of the trace is a rank. Decoder ranks record the iteration alone; score ranks have a side
of their own, in score/trace.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from megatron_kosmosg.config.paths import trace_file
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.files import write_json
from megatron_kosmosg.launcher import find_rank_info
from megatron_kosmosg.monitoring.spans import (
    SEND,
    UNET,
    WAIT,
    MegatronTimers,
    RecordSpan,
    Spans,
    no_record,
)
from megatron_kosmosg.monitoring.trace_exchange import TraceExchange, TracePart
from megatron_kosmosg.parallel.context import ParallelContext

T = TypeVar("T")
"""A batch, of whatever form."""
ITERATION = "iteration"
"""Name of the stretch that bounds the trace; `about` has its number."""


class Recorded(Protocol):
    """What names stretches of its time through a record that it is given."""

    record: RecordSpan


class DecoderTrace:
    """A decoder rank's side; rank 0 writes the file. Does nothing where none is asked for."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        chunks: list[DistributedDataParallel],
        optimizer: ChainedOptimizer,
        recorded: Recorded | None = None,
    ) -> None:
        """Collective with the score ranks' `ScoreTrace`, unless the config asks for no trace.

        Args:
            recorded: what else names its stretches of time while a trace is made.
        """
        self._config, self._context, self._recorded = config, context, recorded
        self._configs: list[Any] = [chunk.config for chunk in chunks]
        self._configs += [part.config for part in (optimizer, *optimizer.chained_optimizers)]
        self._exchange = open_exchange(config)
        self._is_pending = False

    @contextlib.contextmanager
    def over(self, iteration: int, iterators: list[Iterator[T]]) -> Iterator[list[Iterator[T]]]:
        """Records inside, when it is the iteration; gives the iterators to read batches from."""
        if self._exchange is None or iteration != self._config.logging.trace_iteration:
            yield iterators
            return
        context, spans = self._context, Spans(self._context.device)
        with self._recording(spans), spans(ITERATION, number=iteration):
            yield [spans.over(iterator, "wait for data") for iterator in iterators]
        place = find_rank_info()
        self._exchange.publish(
            f"rank {place.rank}: decoder replica {context.dp_rank}, pipeline stage "
            f"{context.pp_rank}, tensor {context.tp_rank}",
            spans.finished(),
        )
        self._is_pending = place.rank == 0

    def write(self, *, only_all: bool) -> bool:
        """Whether this call wrote the file. only_all: not while parts of ranks are missing."""
        if self._exchange is None or not self._is_pending:
            return False
        parts = self._exchange.collected(only_all=only_all)
        if not parts:
            return False
        write_json(trace_file(self._config), chrome_trace(parts), indent=None, only_writer=True)
        self._is_pending = False
        return True

    @contextlib.contextmanager
    def _recording(self, spans: Spans) -> Iterator[None]:
        timers = MegatronTimers(spans)
        for config in self._configs:
            config.timers = timers
        if self._recorded is not None:
            self._recorded.record = spans
        try:
            yield
        finally:
            for config in self._configs:
                config.timers = None
            if self._recorded is not None:
                self._recorded.record = no_record


def chrome_trace(parts: dict[int, TracePart]) -> dict[str, Any]:
    """The parts as one object of the format, cut to the iteration, times from its begin in us.

    Stretches of score ranks get the number of the micro-batch whose condition was of their sample,
    and arrows from that condition and to its answer.
    """
    everything = [(rank, span) for rank, part in parts.items() for span in part.spans]
    bounds = [span for _, span in everything if span["name"] == ITERATION]
    begin, end = min(b["start"] for b in bounds), max(b["end"] for b in bounds)
    micro_batch_of = {
        span["about"]["sample"]: span["about"]["micro_batch"]
        for _, span in everything
        if span["name"] == SEND
    }
    events: list[dict[str, Any]] = []
    for rank, part in sorted(parts.items()):
        lanes = sorted({span["lane"] for span in part.spans}, reverse=True)  # program, GPU
        events.append(_meta("process_name", rank, 0, name=part.name))
        events.append(_meta("process_sort_index", rank, 0, sort_index=rank))
        for lane, name in enumerate(lanes):
            events.append(_meta("thread_name", rank, lane, name=name))
        for span in part.spans:
            start, stop = max(span["start"], begin), min(span["end"], end)
            if start > stop:
                continue
            about = dict(span["about"])
            if about.get("sample") in micro_batch_of:
                about["micro_batch"] = micro_batch_of[about["sample"]]
            number = about.get("micro_batch", about.get("number"))
            event = {
                "name": span["name"] if number is None else f"{span['name']} {number}",
                "cat": span["name"],
                "ph": "X",
                "pid": rank,
                "tid": lanes.index(span["lane"]),
                "ts": (start - begin) * 1e6,
                "dur": (stop - start) * 1e6,
                "args": about,
            }
            events += [event, *_arrow(event)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


_ARROWS = {SEND: ("s", 0.0), UNET: ("t", 0.5), WAIT: ("f", 1.0)}
"""The part of an arrow that a stretch is, and where in it: a condition's way to its answer."""


def _arrow(event: dict[str, Any]) -> list[dict[str, Any]]:
    if event["cat"] not in _ARROWS or "sample" not in event["args"] or event["tid"]:
        return []
    phase, where = _ARROWS[event["cat"]]
    place = {key: event[key] for key in ("pid", "tid")}
    return [
        place
        | {
            "name": "condition",
            "cat": "score link",
            "ph": phase,
            "id": event["args"]["sample"],
            "ts": event["ts"] + where * event["dur"],
            "bp": "e",
        }
    ]


def _meta(name: str, rank: int, lane: int, /, **about: Any) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": rank, "tid": lane, "args": about}


def open_exchange(config: RunConfig) -> TraceExchange | None:
    """How this rank hands its part to rank 0; None where no trace is asked for. Collective."""
    if config.logging.trace_iteration is None:
        return None
    return TraceExchange(find_rank_info(), config.parallel.timeout_seconds)
