"""The score ranks of a run as one decoder rank sees them: they come, answer, and go at any time.

ZeroMQ carries the messages, CURVE encrypts them and lets in only who has the key of this start of
the run. A thread owns the sockets: the program asks, goes on, and waits in `take` alone. Nothing
that a peer sends, or fails to send, holds up more than the request that was given to it.
Long because a rank's whole stay is here: its arrival, its answers, its end.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import zmq
from zmq.utils import z85

from megatron_kosmosg.score import wire
from megatron_kosmosg.score.messages import Answer, Rows, ScoreRequest
from megatron_kosmosg.score.roster import Evicted, Lack, Member, Roster, Standing, is_finite
from megatron_kosmosg.score.wire import BadMessage, Frames, Limits, Message, RunEnd
from megatron_kosmosg.terminal_text import say

BEAT_SECONDS = 1.0
MOST_SILENCE = 10.0
"""Seconds without a sign of life of a rank's program or node until its connection is closed."""
_LINGER_MS = 2000
_ALLOWED, _REFUSED = b"200", b"400"
_NEWS_MS = 1
"""Between two looks at a condition that is still on its way from the device."""


class ScoreRankFailed(RuntimeError):
    """A score rank of the run's own job ended with an error that others would meet, too, or two
    could not do the same request."""


@dataclass(frozen=True)
class Patience:
    """How many seconds a decoder rank waits for score ranks."""

    answer: float
    """For an answer, before the request goes to another rank, too."""
    alone: float
    """With no score rank left, before the run is saved and stopped."""
    load: float
    """For the first score rank to come, and for one to load the U-Net, before the same; also the
    longest time in all without one that works."""


class Fleet:
    """A decoder rank's end of the links to all score ranks. It has to be closed (`close`)."""

    def __init__(
        self,
        host: str,
        secret: tuple[bytes, bytes],
        limits: Limits,
        patience: Patience,
        audit_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Listens from now on; `admit` begins to serve the ranks that come.

        Args:
            host: the address to listen at.
            secret: (public, secret) key of this end.
            audit_rate: share of the answers of joined ranks that another rank computes again.
            seed: of the choice between score ranks.
        """
        self._limits, self._patience = limits, patience
        self._audit_rate, self._random = audit_rate, random.Random(seed)
        self._roster = Roster(patience.answer, seed)
        self._changed = threading.Condition()
        self._arrivals: dict[int, Callable[[], bool]] = {}
        self._prepare: list[Rows] = []
        self._reference: dict[str, str] | None = None
        self._failures: dict[int, str] = {}
        self._trouble: Exception | None = None
        self._lack: Lack | None = None
        self._lack_since = self._idle_since = 0.0
        self._gave_up = False
        self._end: RunEnd | None = None
        self._num_bytes = 0
        self._guest_key: bytes | None = None
        self._context = zmq.Context()
        self._router = self._listen(secret)
        self.port = self._router.bind_to_random_port(f"tcp://{host}")
        self._gate = self._context.socket(zmq.REP)
        self._gate.bind("inproc://zeromq.zap.01")
        self._bell, self._button = (self._context.socket(kind) for kind in (zmq.PULL, zmq.PUSH))
        self._bell.bind("inproc://bell")
        self._button.connect("inproc://bell")
        self._thread = threading.Thread(target=self._run, name="score-fleet", daemon=True)
        self.on_close: Callable[[], None] = lambda: None
        self.publish: Callable[[dict[str, int]], None] = lambda answered: None

    def admit(self, guest_key: bytes) -> None:
        """Lets score ranks in that have this public key (z85), from now on."""
        self._guest_key = z85.decode(guest_key)
        self._thread.start()

    def submit(self, request: ScoreRequest, has_arrived: Callable[[], bool]) -> int:
        """Number of a request, for `take`. Nothing is waited for. has_arrived: whether the
        condition is in the host's memory yet."""
        with self._changed:
            number = self._roster.submit(request)
            self._arrivals[number] = has_arrived
        self._ring()
        return number

    def prepare(self, rows: Rows) -> None:
        """Tells a score rank to read these targets: their condition will come."""
        with self._changed:
            self._prepare.append(rows)
        self._ring()

    def take(self, number: int) -> Answer | None:
        """The answer to a request, waited for; None when the run has given up waiting for score
        ranks. Raises ScoreRankFailed."""
        with self._changed:
            while True:
                if self._trouble is not None:
                    raise self._trouble
                if number in self._roster.answers:
                    return self._roster.answers.pop(number)
                if self._gave_up:
                    return None
                self._changed.wait()

    def pop_bytes(self) -> int:
        """Bytes sent and received since the last call."""
        with self._changed:
            num_bytes, self._num_bytes = self._num_bytes, 0
        return num_bytes

    def state(self) -> tuple[int, int, float]:
        """(score ranks that work, requests that wait for one, mean seconds to an answer)."""
        with self._changed:
            ready = [member for member in self._roster.members.values() if member.is_ready]
            known = [member.latency for member in ready if member.latency]
            mean = sum(known) / len(known) if known else 0.0
            return len(ready), self._roster.num_waiting, mean

    def publish_answered(self) -> None:
        """Says through `publish` how many answers each kind of hardware has given so far."""
        with self._changed:
            answered = dict(self._roster.answered)
        self.publish(answered)

    def close(self, end: RunEnd) -> None:
        """Tells all score ranks how the run ended; nothing the second time."""
        if self._end is not None:
            return
        with self._changed:
            self._end = end
        if self._thread.is_alive():
            self._ring()
            self._thread.join()
        self.on_close()
        for socket in (self._router, self._gate, self._bell, self._button):
            socket.close(_LINGER_MS)
        self._context.term()

    def _listen(self, secret: tuple[bytes, bytes]) -> zmq.Socket:
        router = self._context.socket(zmq.ROUTER)
        router.curve_publickey, router.curve_secretkey = secret
        router.curve_server = True
        router.zap_domain = b"score"
        router.router_mandatory = True  # a rank that is gone is an error, at once
        router.router_handover = True  # a rank whose connection broke comes back under its name
        router.heartbeat_ivl = int(BEAT_SECONDS * 1000)
        router.heartbeat_timeout = int(MOST_SILENCE * 1000)
        router.maxmsgsize = self._limits.most_bytes
        return router

    def _ring(self) -> None:
        with suppress(zmq.Again):  # it rings already
            self._button.send(b"", zmq.NOBLOCK)

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._exchange()
        except Exception as error:  # the program waits for this thread
            with self._changed:
                self._trouble = error
                self._changed.notify_all()

    def _exchange(self) -> None:
        poller = zmq.Poller()
        for socket in (self._router, self._gate, self._bell):
            poller.register(socket, zmq.POLLIN)
        next_heartbeat = 0.0
        while self._end is None:
            is_coming = self._send_waiting()
            patience = max(0.0, next_heartbeat - time.monotonic())
            ready = dict(poller.poll(_NEWS_MS if is_coming else int(patience * 1000) + 1))
            if self._gate in ready:
                self._let_in()
            while self._bell in ready and self._bell.poll(0):
                self._bell.recv()
            while self._router in ready and self._router.poll(0):
                identity, *frames = self._router.recv_multipart(copy=False)
                self._receive(bytes(identity.buffer), frames)
            now = time.monotonic()
            if now >= next_heartbeat:
                next_heartbeat = now + BEAT_SECONDS
                self._send_heartbeats(now)
        for identity in list(self._roster.members):
            self._send(identity, wire.pack(Message.BYE, int(self._end)))

    def _let_in(self) -> None:
        """ZeroMQ's question (RFC 27) whether a client's key is known."""
        version, request_id, *rest = self._gate.recv_multipart()
        code = _ALLOWED if rest[-1] == self._guest_key else _REFUSED
        self._gate.send_multipart([version, request_id, code, b"", b"", b""])

    def _send_waiting(self) -> bool:
        """Gives requests to free ranks; whether some are still on their way from the device."""
        is_coming = False
        with self._changed:
            prepare, self._prepare = self._prepare, []
            for rows in prepare:
                expected = self._roster.expect(rows, time.monotonic())
                if expected is not None:
                    self._send(expected, wire.pack_prepare(rows))
            for number in self._roster.waiting():
                if not self._arrivals[number]():
                    is_coming = True
                    continue
                identity = self._roster.assign(number, time.monotonic())
                while identity is not None:
                    frames = wire.pack_request(number, self._roster.request(number))
                    if self._send(identity, frames):
                        break
                    if number not in self._roster.waiting():
                        break
                    identity = self._roster.assign(number, time.monotonic())
        return is_coming

    def _send(self, identity: bytes, frames: Frames) -> bool:
        """Sends frames to a score rank, and says whether it is still there."""
        try:
            self._router.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.Again:
            return True  # it takes nothing at the moment; what it misses is asked of another
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            with self._changed:
                self._take_off(identity, "is gone")
            return False
        with self._changed:
            self._num_bytes += sum(len(frame) for frame in frames)
        return True

    def _take_off(self, identity: bytes, why: str) -> None:
        member = self._roster.remove(identity)
        if member is not None:
            say(f"{member.name} {why}; {len(self._roster.members)} left")
        self._changed.notify_all()

    def _send_heartbeats(self, now: float) -> None:
        for identity in list(self._roster.members):
            self._send(identity, wire.pack(Message.BEAT))
        with self._changed:
            for name in self._roster.repeat_late(now):
                say(f"{name} is late; its requests go to others")
            self._notice_lack(now)

    def _notice_lack(self, now: float) -> None:
        lack = self._roster.lack()
        if lack is None or self._gave_up:
            self._lack = None
            return
        limit = self._patience.alone if lack is Lack.LEFT else self._patience.load
        if lack is not self._lack:
            self._idle_since = now if self._lack is None else self._idle_since
            self._lack, self._lack_since = lack, now
            say(f"{lack.value}: training waits up to {limit:.0f} s for one")
        elif now - self._lack_since > limit or now - self._idle_since > self._patience.load:
            self._gave_up = True
            say("no score rank works: the run is saved and stops")
            self._changed.notify_all()

    def _receive(self, identity: bytes, frames: list[Any]) -> None:
        try:
            message, number, parts = wire.unpack(frames, self._limits)
            with self._changed:
                self._num_bytes += sum(len(frame) for frame in frames)
                self._act(identity, message, number, parts)
        except BadMessage as error:
            with self._changed:
                self._evict(identity, f"sent {error}")

    def _act(self, identity: bytes, message: Message, number: int, parts: Any) -> None:
        if message is Message.HELLO:
            self._welcome(identity, wire.unpack_words(parts))
        elif identity not in self._roster.members:
            self._send(identity, wire.pack(Message.UNKNOWN))
        elif message is Message.ANSWER:
            self._answered(identity, number, parts)
        elif message is Message.FAILED:
            self._failed(identity, number, wire.unpack_words(parts))
        elif message is Message.LEAVE:
            self._take_off(identity, "has left")
        elif message is not Message.BEAT:
            raise BadMessage(f"{message.name}, which is not for a decoder rank")

    def _welcome(self, identity: bytes, words: dict[str, Any]) -> None:
        """Takes in a rank that starts to load, that has loaded, or whose connection broke; what it
        was asked before is asked again."""
        try:
            standing, name = Standing(words["standing"]), str(words["name"])
            hardware, prints = str(words["hardware"]), words["prints"]
        except (KeyError, ValueError) as error:
            raise BadMessage("a greeting of another form") from error
        known = self._roster.remove(identity)
        seconds = 0.0 if known is None else known.seconds
        member = Member(name, standing, hardware, seconds=seconds, prints=prints)
        self._roster.members[identity] = member
        if prints is not None and standing is not Standing.JOINED:
            self._reference = self._reference or prints
        is_new = known is None or known.prints is None
        if is_new and prints is not None and standing is Standing.JOINED:
            say(f"{name} has joined ({hardware})")
        self._send(identity, wire.pack(Message.WELCOME))
        # Guests work when a rank of the job has said what they are held against.
        for other, member in list(self._roster.members.items()):
            if self._reference is None or member.prints is None or member.is_ready:
                continue
            member.is_ready = member.prints == self._reference
            if not member.is_ready:
                self._refuse(other, member)

    def _refuse(self, identity: bytes, member: Member) -> None:
        assert self._reference is not None and member.prints is not None
        names = sorted(member.prints.keys() | self._reference.keys())
        other = [n for n in names if member.prints.get(n) != self._reference.get(n)]
        why = f"its {', '.join(other)} differ from those of the run's score ranks"
        self._send(identity, wire.pack_words(Message.REFUSED, {"why": why}))
        self._take_off(identity, f"is refused: {why}")
        if member.standing is not Standing.JOINED:
            self._trouble = ScoreRankFailed(f"{member.name} is refused: {why}")
            self._changed.notify_all()

    def _answered(self, identity: bytes, number: int, parts: Any) -> None:
        member = self._roster.members[identity]
        if number not in member.held:
            return  # of a request that it had before it was gone
        try:
            num_values = self._roster.request(number).num_values
        except KeyError:
            member.held.pop(number)  # another was faster
            member.last, member.is_late = time.monotonic(), False
            return
        answer = wire.unpack_answer(parts, num_values)
        is_guest = member.standing is Standing.JOINED
        if is_guest:
            answer = replace(answer, signal=0)  # its job's end is not this run's
        is_doubted = is_guest and (
            not is_finite(answer) or self._random.random() < self._audit_rate
        )
        evicted = self._roster.answer(
            identity, number, answer, time.monotonic(), is_doubted=is_doubted
        )
        if evicted is not None:
            self._evict_as(evicted)
        if number in self._roster.answers:
            self._arrivals.pop(number, None)
        self._changed.notify_all()

    def _failed(self, identity: bytes, number: int, words: dict[str, Any]) -> None:
        """What the rank was asked goes on to another, once. A rank of the job ends the run with an
        error that others would meet, too."""
        member = self._roster.members[identity]
        failed = f"failed: {words.get('error')}"
        failure, before = f"{member.name} {failed}", self._failures.get(number)
        if number and before:
            self._trouble = ScoreRankFailed(f"{failure}; at the same request, before it, {before}")
        elif words.get("ends_run") and member.standing is not Standing.JOINED:
            self._trouble = ScoreRankFailed(failure)
        self._failures[number] = failure
        self._take_off(identity, failed)

    def _evict(self, identity: bytes, why: str) -> None:
        member = self._roster.members.get(identity)
        self._evict_as(Evicted(identity, "a peer" if member is None else member.name, why))

    def _evict_as(self, evicted: Evicted) -> None:
        self._send(evicted.identity, wire.pack_words(Message.REFUSED, {"why": evicted.why}))
        say(f"{evicted.name} is evicted: {evicted.why}")
        self._roster.remove(evicted.identity)
        self._changed.notify_all()
