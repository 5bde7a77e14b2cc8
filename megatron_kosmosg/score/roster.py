"""Which score rank gets which request, and what becomes of requests whose rank is gone or late.

Bookkeeping of one decoder rank alone: no sockets, and the time is handed in. A request is whole in
itself, so it may be given to several ranks; the first answer counts, later ones are dropped.
Long because every way that a request can take is here, and nowhere else.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch

from megatron_kosmosg.score.messages import Answer, Kind, Rows, ScoreRequest

MOST_AT_ONCE = 2
"""Requests of one decoder rank that a score rank holds: one in work, one whose targets it reads."""
_IMAGES_TAKE = 20
"""How much longer than a loss images may take: they are many passes of the U-Net."""
_MEMORY = 0.8
"""Share of the past in the mean time that a rank takes for a request."""
_FORGOTTEN = 20
"""Times that a rank takes for a request after which it counts as twice as fast, if it has none and
there is one other: with more, as many times longer, so that trying them again costs the same."""
_GUESTS_LOOKED_AT = 2
"""When one is chosen."""
_MOST_EXPECTED = 64
"""Announced rows whose rank is remembered."""


class Standing(Enum):
    """Whom a score rank works for."""

    OWN = "own"
    """Of the run's job, for this replica."""
    RESERVE = "reserve"
    """Of the run's job, for other replicas: it helps where there is nobody else."""
    JOINED = "joined"
    """A guest; its answers may be checked."""


class Lack(Enum):
    """The reason why nobody works on requests."""

    FIRST = "no score rank has come yet"
    LOADING = "no score rank has loaded the U-Net yet"
    LEFT = "no score rank is left"


@dataclass
class Member:
    """A score rank as this decoder rank sees it."""

    name: str
    standing: Standing
    hardware: str = ""
    is_ready: bool = False
    """Whether it has loaded the U-Net."""
    is_late: bool = False
    held: dict[int, float] = field(default_factory=dict)
    """{request: when it was sent}."""
    last: float = 0.0
    """When it last answered."""
    seconds: float = 0.0
    """Mean time that it works on a request; 0: not known yet."""
    latency: float = 0.0
    """Mean time from a request to its answer, waiting behind this replica's others left out."""
    others: int = 0
    """Requests of other replicas that waited for it when it last answered."""
    crowd: float = 0.0
    """Mean of that: what one that seems to have done all that waited has got meanwhile."""
    prints: dict[str, str] | None = None
    """Fingerprints of what it has loaded; None while it loads."""

    @property
    def is_free(self) -> bool:
        return self.is_ready and len(self.held) < MOST_AT_ONCE

    def expected(self, now: float, usual: float, num_others: int) -> float:
        """Seconds that it would take; `usual` where it has not answered yet. That of a rank that is
        not asked counts for less and less: what has held it up may be over. num_others: ranks that
        can be asked instead."""
        if not self.seconds:
            return usual
        unasked = 0.0 if self.held else max(0.0, now - self.last)
        return self.seconds / (1 + unasked / (_FORGOTTEN * max(1, num_others) * self.seconds))

    def queue(self, now: float) -> float:
        """Requests before one that it would get now, as far as one can say."""
        done = (now - self.last) / self.seconds if self.seconds else 0.0
        return len(self.held) + max(self.crowd, self.others - done)


@dataclass
class _Open:
    """A request without an answer that counts."""

    request: ScoreRequest
    held_by: set[bytes] = field(default_factory=set)
    spared: set[bytes] = field(default_factory=set)
    """Ranks that it is not given to (again)."""
    doubted: tuple[bytes, Answer] | None = None
    """An answer that another rank has to confirm."""


@dataclass(frozen=True)
class Evicted:
    """A rank that has answered what it should not."""

    identity: bytes
    name: str
    why: str


class Roster:
    """Score ranks and requests of one decoder rank."""

    def __init__(self, answer_seconds: float, seed: int = 0) -> None:
        """Begins without ranks and requests.

        Args:
            answer_seconds: after so long without an answer, a request goes to another rank, too.
            seed: of the choice between ranks; the other decoder ranks have others.
        """
        self._answer_seconds, self._random = answer_seconds, random.Random(seed)
        self.members: dict[bytes, Member] = {}
        self._open: dict[int, _Open] = {}
        self._waiting: deque[int] = deque()
        self._expected: dict[Rows, bytes] = {}
        self._next = 1
        self.answers: dict[int, Answer] = {}
        """Of requests, until somebody takes them."""
        self._had_rank = False
        self.answered: Counter[str] = Counter()
        """Answers that counted, by the hardware that gave them."""
        self.repeated = 0
        """Requests that were given to a second rank."""

    def submit(self, request: ScoreRequest) -> int:
        """Number of the request, which now waits for a rank."""
        number, self._next = self._next, self._next + 1
        self._open[number] = _Open(request)
        self._waiting.append(number)
        return number

    def request(self, number: int) -> ScoreRequest:
        return self._open[number].request

    @property
    def num_waiting(self) -> int:
        """Number of requests that no rank has."""
        return len(self._waiting)

    def expect(self, rows: Rows, now: float) -> bytes | None:
        """The rank that will get the request for these rows, as far as one can say."""
        chosen = self._choose(set(), now, with_work=True)
        if chosen is not None:
            self._expected[rows] = chosen
            while len(self._expected) > _MOST_EXPECTED:
                del self._expected[next(iter(self._expected))]
        return chosen

    def assign(self, number: int, now: float) -> bytes | None:
        """The free rank that gets a waiting request; None: there is none."""
        job = self._open[number]
        expected = self._expected.get(job.request.rows)
        chosen, others = None, self._others_than(job)
        if expected in self.members and expected not in others:
            member = self.members[expected]
            chosen = expected if member.is_free and not member.is_late else None
        if chosen is None:
            chosen = self._choose(others, now)
        if chosen is None:
            return None
        self._expected.pop(job.request.rows, None)
        self._waiting.remove(number)
        self.repeated += bool(job.spared)
        job.held_by.add(chosen)
        self._had_rank = True
        self.members[chosen].held[number] = now
        return chosen

    def waiting(self) -> list[int]:
        """Requests that no rank has, in the order they were asked."""
        return list(self._waiting)

    def answer(
        self, identity: bytes, number: int, answer: Answer, now: float, *, is_doubted: bool
    ) -> Evicted | None:
        """Takes an answer; whom to evict for it, or for one that it shows to be wrong.

        Args:
            is_doubted: another rank has to confirm it where there is one.
        """
        member = self.members[identity]
        sent = member.held.pop(number, None)
        if sent is not None:
            member.others = max(0, answer.waiting - len(member.held))
            first = not member.seconds
            member.crowd = member.others if first else _mixed(member.crowd, member.others)
            member.seconds = _mean(member.seconds, answer.seconds)
            member.latency = _mean(member.latency, now - max(sent, member.last))
        member.last, member.is_late = now, False
        job = self._open.get(number)
        if job is None:
            return None  # a late duplicate
        job.held_by.discard(identity)
        if job.doubted is not None and job.doubted[0] != identity:
            return self._compare(number, job, member, answer)
        if is_doubted and self._referee(identity) is not None:
            job.doubted = identity, answer
            job.spared = {identity}
            if not job.held_by:
                self._wait_again(number)
            return None
        self._close(number, answer, member.hardware)
        return None

    def remove(self, identity: bytes) -> Member | None:
        """Takes a rank off; its requests wait for another."""
        member = self.members.pop(identity, None)
        for number, job in list(self._open.items()):
            held = identity in job.held_by
            job.held_by.discard(identity)
            job.spared.discard(identity)
            if job.doubted is not None and job.doubted[0] == identity:
                job.doubted, held = None, True
            if held and not job.held_by:
                self._wait_again(number)
            if job.doubted is not None and not job.held_by and not self._has_referee(job):
                # Nobody is left to confirm it.
                self._close(number, job.doubted[1], self.members[job.doubted[0]].hardware)
        return member

    def repeat_late(self, now: float) -> list[str]:
        """Lets requests of ranks that are late wait for others, too; names of ranks newly late."""
        names = []
        for member in self.members.values():
            for number, sent in member.held.items():
                job = self._open.get(number)
                if job is None or now - max(sent, member.last) <= self._patience(job):
                    continue
                if not member.is_late:
                    names.append(member.name)
                member.is_late = True
                self._wait_again(number)
        return names

    def lack(self) -> Lack | None:
        """Why there are requests that nobody works on and nobody can be given; None: they can."""
        on_time = [member for member in self.members.values() if not member.is_late]
        if not self._open or any(member.is_ready for member in on_time):
            return None
        if on_time:
            return Lack.LOADING
        return Lack.LEFT if self._had_rank else Lack.FIRST

    def _patience(self, job: _Open) -> float:
        is_images = job.request.kind is Kind.IMAGES
        return self._answer_seconds * (_IMAGES_TAKE if is_images else 1)

    def _choose(self, without: set[bytes], now: float, *, with_work: bool = False) -> bytes | None:
        """The rank of a few that will be done first; those of other replicas only where nobody else
        is. Of a few: what one knows of a rank is old, and all replicas would choose the same."""
        reachable = {
            identity: member
            for identity, member in self.members.items()
            if identity not in without and member.is_ready
        }
        on_time = {i: m for i, m in reachable.items() if not m.is_late} or reachable
        close = {i: m for i, m in on_time.items() if m.standing is not Standing.RESERVE} or on_time
        expected = list(self._expected.values())
        free = [i for i, m in close.items() if with_work or m.is_free]
        own = [i for i in free if close[i].standing is Standing.OWN]
        guests = [i for i in free if close[i].standing is not Standing.OWN]
        looked_at = own + self._random.sample(guests, min(_GUESTS_LOOKED_AT, len(guests)))

        def cost(identity: bytes) -> tuple[float, float]:
            member = close[identity]
            usual = _usual_seconds(member.hardware, close)
            work = 1 + member.queue(now) + (expected.count(identity) if with_work else 0)
            return work * member.expected(now, usual, len(close) - 1), work

        return min(looked_at, key=cost, default=None)

    def _wait_again(self, number: int) -> None:
        job = self._open[number]
        if job.doubted is None:
            job.spared = set(job.held_by)
        if number not in self._waiting:
            self._waiting.appendleft(number)

    def _referee(self, doubted: bytes) -> bytes | None:
        """Who confirms the answers of a rank: one of the run's own, else any other."""
        others = {i: m for i, m in self.members.items() if i != doubted and m.is_ready}
        own = [i for i, m in others.items() if m.standing is not Standing.JOINED]
        return next(iter(own or others), None)

    def _others_than(self, job: _Open) -> set[bytes]:
        """Who does not get a request. An answer that is doubted is confirmed by its referee alone,
        also where ranks have come or gone since: a liar would else confirm an honest one's."""
        if job.doubted is None:
            return job.spared | job.held_by
        return (set(self.members) - {self._referee(job.doubted[0])}) | job.held_by

    def _has_referee(self, job: _Open) -> bool:
        assert job.doubted is not None
        if self._referee(job.doubted[0]) is None:
            return False
        job.spared = {job.doubted[0]}
        return True

    def _compare(self, number: int, job: _Open, member: Member, answer: Answer) -> Evicted | None:
        assert job.doubted is not None
        identity, doubted = job.doubted
        other = self.members.get(identity)
        same_kind = other is None or other.hardware == member.hardware
        self._close(number, answer, member.hardware)
        if other is None or agree(doubted, answer, bitwise=same_kind):
            return None
        why = f"its numbers for a request are not those of {member.name}"
        return Evicted(identity, other.name, why)

    def _close(self, number: int, answer: Answer, hardware: str) -> None:
        del self._open[number]
        self.answered[hardware] += 1
        if number in self._waiting:
            self._waiting.remove(number)
        self.answers[number] = answer


def _usual_seconds(hardware: str, members: Mapping[bytes, Member]) -> float:
    """What ranks of the same hardware take for a request, else any; 0: none has answered yet."""
    known = [member for member in members.values() if member.seconds]
    known = [member for member in known if member.hardware == hardware] or known
    return sum(member.seconds for member in known) / max(1, len(known))


def _mean(known: float, value: float) -> float:
    return _mixed(known, value) if known else value


def _mixed(known: float, value: float) -> float:
    return _MEMORY * known + (1 - _MEMORY) * value


MOST_DIFFERENCE = 0.05
"""Relative, between kinds of hardware: bf16's rounding in the U-Net gives about a third of it."""


def agree(one: Answer, other: Answer, *, bitwise: bool) -> bool:
    """Whether two ranks computed the same. They need not agree to the bit, only up to the rounding
    of other hardware."""
    if one.bad_samples != other.bad_samples:
        return False
    # Each by itself: a loss is a thousand times as large as a gradient, and would hide it.
    parts = (
        (one.payload, other.payload),
        (torch.tensor([one.loss]), torch.tensor([other.loss])),
    )
    if bitwise:
        return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in parts)
    return all(_are_near(a, b) for a, b in parts)


def _are_near(first: torch.Tensor, second: torch.Tensor) -> bool:
    finite = torch.isfinite(first)
    if not torch.equal(finite, torch.isfinite(second)):
        return False
    first, second = first[finite], second[finite]
    return float((first - second).norm()) <= MOST_DIFFERENCE * float(second.norm())


def is_finite(answer: Answer) -> bool:
    """Whether an answer's loss and payload are finite."""
    return bool(torch.isfinite(answer.payload).all()) and answer.loss - answer.loss == 0
