"""One update of a run that score ranks of other jobs have joined, played through event by event.

The order of passes is that of `timeline.py`, but all replicas are played at once, since they share
the ranks that joined, and every request goes to the rank, of the replica's own and of all that
joined, that would answer first. A run chooses with less knowledge and its times vary:
benchmarks/score_fleet.py simulates that.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_kosmosg.planning.timeline import Timeline, pass_order


@dataclass(frozen=True)
class Servers:
    """Score ranks that are alike, one or more."""

    count: int
    seconds: float
    """That one takes for a request."""
    link: float
    """Seconds that a request takes to one, and its answer back."""


@dataclass(frozen=True)
class FleetTimeline(Timeline):
    """`score_busy` is that of the replicas' own score ranks."""

    busy: tuple[float, ...]
    """Seconds that a rank of each sort that joined works, mean over them."""


class _Queue:
    """When each of some score ranks is free."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.busy = 0.0
        """Seconds that one works, mean over them."""
        self._free = [0.0] * servers.count  # all equal, so a heap

    def would_answer(self, now: float) -> float:
        """When the answer to a request of now would be back."""
        link = self.servers.link
        return max(self._free[0], now + link) + self.servers.seconds + link

    def take(self, now: float) -> None:
        start = max(self._free[0], now + self.servers.link)
        heapq.heapreplace(self._free, start + self.servers.seconds)
        self.busy += self.servers.seconds / self.servers.count


class _Run:
    """Passes that are over, and who works on what next."""

    def __init__(
        self,
        forward: Sequence[Sequence[float]],
        backward: Sequence[Sequence[float]],
        servers: list[list[_Queue]],
        parts: int,
        ahead: int,
    ) -> None:
        """servers: [replica], those that it may ask."""
        self._seconds = {"F": forward, "B": backward}
        self._num_pipeline_stages, self._count = len(forward), len(forward[0])
        self._servers, self._parts = servers, parts
        self._orders = [
            pass_order(self._num_pipeline_stages, pipeline_stage, self._count, ahead)
            for pipeline_stage in range(self._num_pipeline_stages)
        ]
        places = [(r, s) for r in range(len(servers)) for s in range(self._num_pipeline_stages)]
        self._next, self._free = dict.fromkeys(places, 0), dict.fromkeys(places, 0.0)
        self._works = dict.fromkeys(places, False)
        # By pass, replica, pipeline stage and number.
        self._done: dict[tuple[str, int, int, int], float] = {}
        self._events: list[tuple[float, int, int, str, int]] = []

    def play(self) -> float:
        """Seconds until all have ended."""
        for replica, pipeline_stage in self._next:
            self._go_on(replica, pipeline_stage)
        while self._events:
            end, replica, pipeline_stage, name, number = heapq.heappop(self._events)
            self._works[replica, pipeline_stage] = False
            self._done[name, replica, pipeline_stage, number] = end
            if (name, pipeline_stage) == ("F", self._num_pipeline_stages - 1):
                self._request(end, replica, number)
            neighbour = pipeline_stage + 1 if name == "F" else pipeline_stage - 1
            if 0 <= neighbour < self._num_pipeline_stages:
                self._go_on(replica, neighbour)
            self._go_on(replica, pipeline_stage)
        return max(self._free.values())

    def _go_on(self, replica: int, pipeline_stage: int) -> None:
        """Starts the next pass of a rank where it is free and the inputs are there."""
        place = replica, pipeline_stage
        if self._works[place] or self._next[place] == 2 * self._count:
            return
        name, number = self._orders[pipeline_stage][self._next[place]]
        needed = ("F", pipeline_stage - 1) if name == "F" else ("B", pipeline_stage + 1)
        if name == "B" and pipeline_stage == self._num_pipeline_stages - 1:
            needed = "S", pipeline_stage
        ready = 0.0
        if needed[1] >= 0:
            key = needed[0], replica, needed[1], number
            if key not in self._done:
                return
            ready = self._done[key]
        end = max(self._free[place], ready) + self._seconds[name][pipeline_stage][number]
        self._free[place], self._works[place] = end, True
        self._next[place] += 1
        heapq.heappush(self._events, (end, replica, pipeline_stage, name, number))

    def _request(self, now: float, replica: int, number: int) -> None:
        answered = 0.0
        for _ in range(self._parts):
            queue = min(self._servers[replica], key=lambda queue: queue.would_answer(now))
            answered = max(answered, queue.would_answer(now))
            queue.take(now)
        self._done["S", replica, self._num_pipeline_stages - 1, number] = answered


def play_fleet(
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    unit_servers: Servers,
    joined: Sequence[Servers],
    *,
    units: int,
    replicas: int = 1,
    parts: int = 1,
    ahead: int = 0,
) -> FleetTimeline:
    """forward, backward: [pipeline stage][micro-batch] seconds.

    unit_servers: the score ranks of a unit of `replicas` replicas, of which there are `units`.
    joined: those of all. parts: requests of a micro-batch. ahead: extra warm-up forwards of every
    pipeline stage.
    """
    shared, unit_queues = (
        [_Queue(servers) for servers in joined],
        [_Queue(unit_servers) for _ in range(units)],
    )
    queues = [[queue, *shared] for queue in unit_queues for _ in range(replicas)]
    seconds = _Run(forward, backward, queues, parts, ahead).play()
    busy = sum(map(sum, forward)) + sum(map(sum, backward))
    return FleetTimeline(
        seconds=seconds,
        decoder_busy=busy / len(forward),
        score_busy=sum(queue.busy for queue in unit_queues) / units,
        busy=tuple(queue.busy for queue in shared),
    )
