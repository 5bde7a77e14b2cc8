"""How the ranks' parts of a trace come together on rank 0, on one clock.

Decoder and score ranks share no process group, so both go through the store of the rendezvous. The
ranks of a node share its clock; the first rank of every other node asks rank 0 for the time.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, cast

from megatron_kosmosg.launcher import RankInfo, node_name
from megatron_kosmosg.monitoring.spans import Span
from megatron_kosmosg.parallel.rendezvous import connect_to_store

_NUM_ROUND_TRIPS = 8
"""Times that a node asks for the time; the quickest answer counts."""


@dataclass(frozen=True)
class TracePart:
    """What one rank did: its share of the trace."""

    name: str
    """What the rank is, for people."""
    spans: list[dict[str, Any]]
    """`name`, `about`, `lane`, and `start` and `end` in seconds since the epoch on rank 0's
    clock."""


class TraceExchange:
    """One rank's end. Collective: all ranks of the job open it, and wait for the others there."""

    def __init__(self, rank_info: RankInfo, timeout_seconds: float) -> None:
        self._rank, self._world_size = rank_info.rank, rank_info.world_size
        self._store = connect_to_store(rank_info, timedelta(seconds=timeout_seconds))
        self.clock_offset = self._agree()
        """Seconds to add to this node's time to have rank 0's."""

    def publish(self, name: str, spans: Sequence[Span]) -> None:
        """Leaves this rank's part where rank 0 finds it."""
        part = TracePart(name, [self._on_shared_clock(span) for span in spans])
        packed = zlib.compress(json.dumps(asdict(part)).encode())
        self._store.set(_key(self._rank), cast(str, packed))  # annotated so, and takes bytes too

    def collected(self, *, only_all: bool) -> dict[int, TracePart]:
        """The parts that have come, by rank; with only_all, none before all have come. Never
        waits."""
        keys = [_key(rank) for rank in range(self._world_size)]
        if only_all and not self._store.check(keys):
            return {}
        return {
            rank: TracePart(**json.loads(zlib.decompress(self._store.get(key))))
            for rank, key in enumerate(keys)
            if self._store.check([key])
        }

    def _on_shared_clock(self, span: Span) -> dict[str, Any]:
        return {
            "name": span.name,
            "about": span.about,
            "lane": span.lane,
            "start": span.start + self.clock_offset,
            "end": span.end + self.clock_offset,
        }

    def _agree(self) -> float:
        store, node = self._store, node_name()
        store.set(f"kosmosg/clock/node/{self._rank}", node)
        if self._rank == 0:
            names = [
                store.get(f"kosmosg/clock/node/{rank}").decode() for rank in range(self._world_size)
            ]
            firsts = {name: names.index(name) for name in names}
            store.set("kosmosg/clock/firsts", json.dumps(firsts))
            for rank in sorted(firsts.values()):
                for number in range(_NUM_ROUND_TRIPS if rank else 0):
                    store.wait([f"kosmosg/clock/request/{rank}/{number}"])
                    store.set(f"kosmosg/clock/reply/{rank}/{number}", repr(time.time()))
        first = json.loads(store.get("kosmosg/clock/firsts"))[node]
        if first == 0:
            return 0.0
        if first == self._rank:
            store.set(f"kosmosg/clock/offset/{node}", repr(self._measure_offset()))
        return float(store.get(f"kosmosg/clock/offset/{node}"))

    def _measure_offset(self) -> float:
        """Rank 0's time less this node's; half the quickest round trip is the largest error."""
        tried = []
        for number in range(_NUM_ROUND_TRIPS):
            sent = time.time()
            self._store.set(f"kosmosg/clock/request/{self._rank}/{number}", "")
            reply = float(self._store.get(f"kosmosg/clock/reply/{self._rank}/{number}"))
            back = time.time()
            tried.append((back - sent, reply - (sent + back) / 2))
        return min(tried)[1]


def _key(rank: int) -> str:
    return f"kosmosg/trace/{rank}"
