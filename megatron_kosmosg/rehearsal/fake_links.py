"""Both ends of the links between decoder and score ranks: they answer, ask and count."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch

from megatron_kosmosg.rehearsal.recorder import CollectiveCount, Recorder
from megatron_kosmosg.score.member import ReceivedRequest
from megatron_kosmosg.score.messages import Answer, Rows, ScoreRequest
from megatron_kosmosg.score.wire import RunEnd


class FakeFleet:
    """Stands for score.fleet.Fleet: score ranks that answer at once, in numbers of no meaning.

    That the host waits for an answer is what the program is made for, and no finding.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._submitted: dict[int, ScoreRequest] = {}

    def prepare(self, rows: Rows) -> None: ...

    def submit(self, request: ScoreRequest, has_arrived: Callable[[], bool]) -> int:
        number = len(self._submitted)
        self._submitted[number] = request
        _count(self._recorder, "send to score ranks", request.condition)
        return number

    def take(self, number: int) -> Answer | None:
        payload = torch.zeros(self._submitted[number].num_values)
        _count(self._recorder, "receive from score ranks", payload)
        return Answer(0.0, 0, 0, 0.0, 0.0, payload)

    def pop_bytes(self) -> int:
        return 0

    def state(self) -> tuple[int, int, float]:
        return 1, 0, 0.0

    def publish_answered(self) -> None: ...

    def close(self, end: RunEnd) -> None: ...


class FakeMembership:
    """Stands for score.member.Membership: decoder ranks that ask what they are told to, and end."""

    def __init__(
        self,
        recorder: Recorder,
        requests: list[ScoreRequest],
        has_replied: Callable[[int], None] = lambda num_replies: None,
    ) -> None:
        """has_replied: is called after each reply with their number."""
        self._recorder, self._requests = recorder, deque(requests)
        self._has_replied, self._num_replies = has_replied, 0
        self.prepare: Callable[[Rows], None] = lambda rows: None

    def is_loaded(self, prints: dict[str, str]) -> None:
        """The rows of the first request are announced."""
        self._announce()

    def take(self, seconds: float | None = None) -> ReceivedRequest | None:
        """A request comes when there is nothing else to do, as where decoder ranks are slow."""
        if seconds == 0 or not self._requests:
            return None
        received = ReceivedRequest(0, len(self._requests), self._requests.popleft())
        self._announce()
        return received

    @property
    def end(self) -> RunEnd | None:
        return None if self._requests else RunEnd.DONE

    def reply(self, received: ReceivedRequest, answer: Answer) -> None:
        _count(self._recorder, "send to decoder ranks", answer.payload)
        self._num_replies += 1
        self._has_replied(self._num_replies)

    def wake(self) -> None: ...

    def leave(self) -> None: ...

    def _announce(self) -> None:
        if self._requests:
            self.prepare(self._requests[0].rows)


def answer_every_request(reporter: Any) -> None:
    """The sums over ranks, which are ones here, would tell training that answers are missing, and
    it would leave out the optimizer's step. reporter: training.step.Reporter."""
    totals = reporter.totals

    @wraps(totals)
    def all_answered(self: Any, *arguments: Any) -> Any:
        found, *others = totals(self, *arguments)
        return replace(found, score=replace(found.score, unanswered=0)), *others

    reporter.totals = all_answered


def _count(recorder: Recorder, name: str, tensor: torch.Tensor) -> None:
    traffic = recorder.now.collectives.setdefault(name, CollectiveCount())
    traffic.calls += 1
    traffic.num_bytes += tensor.nbytes
