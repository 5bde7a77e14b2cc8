"""A large fleet in simulated time: what queueing costs, by the program's own choice of score ranks.

Each replica has the bookkeeping that a run has (score/roster.py); passes of the decoder, answers
and the way there and back take the given times. The defaults are of one H100 (docs/gpu_results.md:
16 rows of the frozen U-Net at 132.1 images/s; 16 rows of an update without it) and of loopback
(benchmarks/score_link.py). Held against the speed if nobody ever queued.

    python -m benchmarks.score_fleet --replicas 64 --score-ranks 64
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_kosmosg.score.messages import Answer, Kind, Rows, ScoreRequest
from megatron_kosmosg.score.roster import Member, Roster, Standing

SETTLING = 3
"""Updates before the count begins."""


@dataclass(frozen=True)
class Times:
    """Seconds."""

    forward: Sequence[float]
    """Of each micro-batch of an update."""
    backward: Sequence[float]
    spread: float
    """Standard deviation of each, as a share of it."""


@dataclass(frozen=True)
class Result:
    images_per_second: float
    decoder_idle: float
    score_idle: float


@dataclass
class _Rank:
    """A score rank, for all replicas."""

    unet: float
    """Seconds for a request."""
    link: float
    """There and back."""
    queue: deque[tuple[int, int]] = field(default_factory=deque)
    busy: float = 0.0
    is_working: bool = False
    is_gone: bool = False


class Fleet:
    """Replicas, score ranks and a clock."""

    def __init__(self, replicas: int, window: int, times: Times, seed: int = 0) -> None:
        self._times, self._random = times, random.Random(seed)
        self._micro_batches, self._window = len(times.forward), window
        self._now, self._count = 0.0, itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._rosters = [Roster(1e9, replica) for replica in range(replicas)]
        self._ranks: list[_Rank] = []
        self._programs: list[Iterator[float | int]] = []
        self._awaited: dict[int, tuple[int, float]] = {}
        self.waited = 0.0

    def join(self, unet: float, link: float, own_of: Container[int] | None = None) -> None:
        """A score rank comes: of the job, for some replicas, or a guest. unet: seconds that it
        takes for a request; link: seconds there and back."""
        name, self._ranks = str(len(self._ranks)), [*self._ranks, _Rank(unet, link)]
        for replica, roster in enumerate(self._rosters):
            standing = Standing.JOINED
            if own_of is not None:
                standing = Standing.OWN if replica in own_of else Standing.RESERVE
            roster.members[name.encode()] = Member(name, standing, f"{unet:g}", is_ready=True)
            self._give(replica)

    def kill(self, rank: int) -> None:
        """It answers nothing any more."""
        self._ranks[rank].is_gone = True
        for replica, roster in enumerate(self._rosters):
            roster.remove(str(rank).encode())
            self._give(replica)

    def update(self) -> float:
        """Seconds of one update of all replicas, that ends when the last one has."""
        began = self._now
        self._programs = [self._program(replica) for replica in range(len(self._rosters))]
        for replica in range(len(self._rosters)):
            self._go_on(replica)
        while self._events:
            self._now, _, act = heapq.heappop(self._events)
            act()
        return self._now - began

    @property
    def busy(self) -> float:
        """Seconds that score ranks worked, summed."""
        return sum(rank.busy for rank in self._ranks)

    def _program(self, replica: int) -> Iterator[float | int]:
        """Seconds of work, and numbers of requests that are awaited."""
        pending: deque[int] = deque()
        behind = iter(self._times.backward)
        for position in range(self._micro_batches):
            yield self._lasts(self._times.forward[position])
            rows = Rows((replica * self._micro_batches + position,), (0,))
            pending.append(self._ask(replica, rows))
            if len(pending) >= self._window:
                yield -pending.popleft()
                yield self._lasts(next(behind))
        while pending:
            yield -pending.popleft()
            yield self._lasts(next(behind))

    def _go_on(self, replica: int) -> None:
        step = next(self._programs[replica], None)
        if step is None:
            return
        if step >= 0:
            self._after(step, lambda: self._go_on(replica))
            return
        if self._rosters[replica].answers.pop(-step, None) is not None:
            self._go_on(replica)
        else:
            self._awaited[replica] = -step, self._now

    def _ask(self, replica: int, rows: Rows) -> int:
        request = ScoreRequest(Kind.GRADIENT, rows, torch.zeros(0), torch.ones(()))
        number = self._rosters[replica].submit(request)
        self._give(replica)
        return number

    def _give(self, replica: int) -> None:
        roster = self._rosters[replica]
        for number in roster.waiting():
            identity = roster.assign(number, self._now)
            if identity is None:
                continue
            rank = self._ranks[int(identity)]
            self._after(rank.link / 2, lambda r=rank, n=number: self._arrives(r, replica, n))

    def _arrives(self, rank: _Rank, replica: int, number: int) -> None:
        rank.queue.append((replica, number))
        if not rank.is_working:
            self._work(rank)

    def _work(self, rank: _Rank) -> None:
        rank.is_working = bool(rank.queue) and not rank.is_gone
        if rank.is_working:
            replica, number = rank.queue.popleft()
            seconds = self._lasts(rank.unet)
            self._after(seconds, lambda: self._done(rank, replica, number, seconds))

    def _done(self, rank: _Rank, replica: int, number: int, seconds: float) -> None:
        rank.busy += seconds
        answer = Answer(0.0, 0, 0, 0.0, seconds, torch.zeros(0), len(rank.queue))
        self._after(rank.link / 2, lambda: self._answered(rank, replica, number, answer))
        self._work(rank)

    def _answered(self, rank: _Rank, replica: int, number: int, answer: Answer) -> None:
        if rank.is_gone:
            return
        roster, identity = self._rosters[replica], str(self._ranks.index(rank)).encode()
        roster.answer(identity, number, answer, self._now, is_doubted=False)
        awaited, since = self._awaited.get(replica, (0, 0.0))
        if awaited == number:
            roster.answers.pop(number)
            del self._awaited[replica]
            self.waited += self._now - since
            self._go_on(replica)
        self._give(replica)

    def _lasts(self, mean: float) -> float:
        return max(0.0, self._random.gauss(mean, self._times.spread * mean))

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._count), act))


def measured(fleet: Fleet, updates: int, replicas: int, ranks: int, images: int) -> Result:
    """Of `updates` updates, when the first ones have passed."""
    for _ in range(SETTLING):
        fleet.update()
    waited, busy = fleet.waited, fleet.busy
    seconds = sum(fleet.update() for _ in range(updates))
    idle = (fleet.waited - waited) / replicas / seconds
    return Result(updates * images / seconds, idle, 1 - (fleet.busy - busy) / ranks / seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--score-ranks", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, default=8, help="of a replica's update (8)")
    parser.add_argument("--rows", type=int, default=16, help="of a micro-batch (16)")
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--updates", type=int, default=10)
    for name, seconds in (("forward", 0.1), ("backward", 0.2), ("unet", 0.121), ("link", 0.025)):
        parser.add_argument(f"--{name}", type=float, default=seconds, metavar="SECONDS")
    parser.add_argument("--spread", type=float, default=0.1, help="of all times, a share (0.1)")
    args = parser.parse_args(arguments)
    passes = [args.forward] * args.micro_batches, [args.backward] * args.micro_batches
    times = Times(*passes, args.spread)
    replicas, ranks = args.replicas, args.score_ranks
    images = replicas * args.micro_batches * args.rows
    print(
        f"{replicas} replicas, {images} images an update; images/s, idle of decoder, of score side"
    )

    def show(name: str, speed: float, come: Callable[[Fleet], None], there: int) -> None:
        fleet = Fleet(replicas, args.window, times)
        come(fleet)
        found = measured(fleet, args.updates, replicas, there, images)
        busy = replicas * args.micro_batches
        decoder = args.micro_batches * (args.forward + args.backward)
        planned = images / max(decoder, busy * args.unet / speed)
        print(
            f"{name:34} {found.images_per_second:8.0f} {found.decoder_idle:6.1%} "
            f"{found.score_idle:6.1%}   {found.images_per_second / planned:.2f} of {planned:.0f} "
            "without queues"
        )

    def own(fleet: Fleet) -> None:
        for rank in range(ranks):
            fleet.join(args.unet, args.link, own_of=(rank % replicas,))

    def guests(fleet: Fleet) -> None:
        for _ in range(ranks):
            fleet.join(args.unet, args.link)

    def halved(fleet: Fleet) -> None:
        guests(fleet)
        for rank in range(0, ranks, 2):
            fleet.kill(rank)

    def slow(fleet: Fleet) -> None:
        for rank in range(ranks):
            fleet.join(args.unet * (1 + rank % 2), args.link)

    half = ranks - len(range(0, ranks, 2))
    show(f"{ranks} of the job", ranks, own, ranks)
    show(f"{ranks} that joined", ranks, guests, ranks)
    show(f"{half} that joined", half, halved, half)
    show(f"{ranks} that joined, half at half speed", ranks * 0.75, slow, ranks)


if __name__ == "__main__":
    main()
