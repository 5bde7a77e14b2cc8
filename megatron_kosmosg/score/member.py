"""A score rank's end: its connections to all decoder ranks of a run, kept by a thread.

The thread says HELLO wherever a connection is made or made again, hands on what is asked, and
notices decoder ranks that are gone. The program takes requests, works and replies.
Long because the whole stay of a score rank is here.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from megatron_kosmosg import exit_codes
from megatron_kosmosg.monitoring.failure import exit_code_of
from megatron_kosmosg.score import wire
from megatron_kosmosg.score.messages import Answer, Rows, ScoreRequest
from megatron_kosmosg.score.roster import Standing
from megatron_kosmosg.score.wire import BadMessage, Frames, Limits, Message, RunEnd

LOST_SECONDS = 10.0
"""Without a connection to a decoder rank for so long, it is gone."""
BEAT_SECONDS = 1.0
LOADING_SECONDS = 600.0
"""A rank that still loads so long after the run has ended, or is lost, ends: its disk hangs."""
_LINGER_MS = 2000
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class DecoderLost(RuntimeError):
    """A decoder rank of the run is gone without a word."""


class NotAdmitted(RuntimeError):
    """The run does not let this rank work for it; the message says why."""


class KeyIsOld(NotAdmitted):
    """The run was started anew since this rank read its key."""


@dataclass(frozen=True)
class DecoderAddress:
    """The address at which a decoder rank listens, and the key of that end."""

    replica: int
    address: str
    """tcp://HOST:PORT."""
    key: str
    """Its public key, z85."""


@dataclass(frozen=True)
class ReceivedRequest:
    """A request that this rank is to answer."""

    decoder: int
    number: int
    request: ScoreRequest


class Membership:
    """Connections to `decoders`, from the start of a rank, before it has loaded anything, on.

    As a context manager it tells them of an error that leaves it.
    """

    def __init__(
        self,
        decoders: Sequence[DecoderAddress],
        key: tuple[bytes, bytes],
        limits: Limits,
        name: str,
        hardware: str,
        standing: Callable[[int], Standing],
        prepare: Callable[[Rows], None] = lambda rows: None,
        *,
        silence_seconds: float,
    ) -> None:
        """Connects to all decoder ranks; a thread keeps the connections.

        Args:
            key: (public, secret) key of the run's score ranks.
            name: of this rank, told to people.
            hardware: kind of this rank's device, told to people.
            standing: whom this rank is for, by replica.
            prepare: is called, in the thread, with rows whose condition will come.
            silence_seconds: a decoder rank that says nothing for so long counts as gone, though
                the connection holds: its process is stopped, or its node is down.
        """
        self._decoders, self._limits = list(decoders), limits
        self._about = {"name": name, "hardware": hardware}
        self._standing = standing
        self.prepare = prepare
        self._prints: dict[str, str] | None = None
        self._received: queue.SimpleQueue[ReceivedRequest | None] = queue.SimpleQueue()
        self._outgoing: queue.SimpleQueue[tuple[int | None, Frames]] = queue.SimpleQueue()
        self._ends: dict[int, RunEnd] = {}
        self._trouble: Exception | None = None
        self._over_since: float | None = None
        self._lost_since: dict[int, float] = {}
        self._silence_seconds = silence_seconds
        self._silent = dict.fromkeys(range(len(decoders)), 0.0)
        self._working: ReceivedRequest | None = None
        self._has_answered = False
        self._is_over = False
        self._context = zmq.Context()
        identity = uuid.uuid4().bytes
        self._sockets = [self._connect(decoder, key, identity) for decoder in decoders]
        self._monitors = [socket.get_monitor_socket(_EVENTS) for socket in self._sockets]
        for socket, decoder in zip(self._sockets, decoders, strict=True):
            socket.connect(decoder.address)
        self._bell, self._button = (self._context.socket(kind) for kind in (zmq.PULL, zmq.PUSH))
        self._bell.bind("inproc://bell")
        self._button.connect("inproc://bell")
        self._ringing = threading.Lock()
        self._lost_since = dict.fromkeys(range(len(decoders)), time.monotonic())
        self._thread = threading.Thread(target=self._run, name="score-member", daemon=True)
        self._thread.start()

    def __enter__(self) -> Membership:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, (DecoderLost, NotAdmitted)):
            what = f"{type(error).__name__}: {error}"[:1000]
            words = {"error": what, "ends_run": self.ends_run(error)}
            work = self._working
            number = 0 if work is None else work.number
            for decoder in range(len(self._decoders)):
                frames = wire.pack_words(Message.FAILED, words)
                if work is not None and work.decoder == decoder:
                    frames[0] = wire.pack(Message.FAILED, number)[0]
                self._send(decoder, frames)
        self.close()

    def ends_run(self, error: BaseException) -> bool:
        """Whether the run should end with this error of a rank of its job: one that other ranks
        and the next start would meet, too. That is what is said of settings, inputs and disks, and
        all that comes before the first answer: whatever keeps a rank from work from its start on.
        """
        is_the_runs = isinstance(error, (DecoderLost, NotAdmitted))
        return is_the_runs or not self._has_answered or exit_code_of(error) != exit_codes.FAILURE

    def is_loaded(self, prints: dict[str, str]) -> None:
        """Says that this rank can work from now on. `prints` are fingerprints of what it has
        loaded."""
        self._prints = prints
        for decoder in range(len(self._decoders)):
            self._send(decoder, self._hello(decoder))

    def take(self, seconds: float | None = None) -> ReceivedRequest | None:
        """The next request, waited for so long at most; None: there is none, the run has ended,
        or this rank was woken. Raises DecoderLost and NotAdmitted."""
        self._working = None
        if self._trouble is not None:
            raise self._trouble
        if self.end is not None:
            return None
        try:
            self._working = self._received.get(timeout=seconds)
        except queue.Empty:
            return None
        if self._working is None and self._trouble is not None:
            raise self._trouble
        return self._working

    def wake(self) -> None:
        """Ends a wait in `take`, because there is other work."""
        self._received.put(None)

    @property
    def end(self) -> RunEnd | None:
        """How the run ended, when all its decoder ranks have said so."""
        if len(self._ends) < len(self._decoders):
            return None
        return max(self._ends.values())

    def reply(self, received: ReceivedRequest, answer: Answer) -> None:
        """Sends an answer; returns without waiting until it has arrived."""
        answer = replace(answer, waiting=self._received.qsize())
        self._has_answered = True
        self._send(received.decoder, wire.pack_answer(received.number, answer))

    def leave(self) -> None:
        """Tells the decoder ranks that this rank ends; what it was asked goes to others."""
        for decoder in range(len(self._decoders)):
            self._send(decoder, wire.pack(Message.LEAVE))

    def close(self) -> None:
        """Returns when all messages have left this process, which may end then."""
        if not self._is_over:
            self._is_over = True
            self._ring()
            self._thread.join()
            for socket in self._sockets:
                socket.disable_monitor()
            for socket in (*self._sockets, *self._monitors, self._bell, self._button):
                socket.close(_LINGER_MS)
            self._context.term()

    def _connect(
        self, decoder: DecoderAddress, key: tuple[bytes, bytes], identity: bytes
    ) -> zmq.Socket:
        socket = self._context.socket(zmq.DEALER)
        socket.curve_publickey, socket.curve_secretkey = key
        socket.curve_serverkey = decoder.key.encode()
        socket.identity = identity
        socket.maxmsgsize = self._limits.most_bytes
        socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 1000
        return socket

    def _hello(self, decoder: int) -> Frames:
        standing = self._standing(self._decoders[decoder].replica).value
        words: dict[str, Any] = {"standing": standing, "prints": self._prints}
        return wire.pack_words(Message.HELLO, self._about | words)

    def _send(self, decoder: int | None, frames: Frames) -> None:
        self._outgoing.put((decoder, frames))
        self._ring()

    def _ring(self) -> None:
        with self._ringing, suppress(zmq.Again):  # it rings already
            self._button.send(b"", zmq.NOBLOCK)

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._exchange()
        except Exception as error:  # the program waits for this thread
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self._trouble = self._trouble or error
        self._received.put(None)

    def _exchange(self) -> None:
        poller = zmq.Poller()
        for socket in (*self._sockets, *self._monitors, self._bell):
            poller.register(socket, zmq.POLLIN)
        before = time.monotonic()
        while True:
            poller.poll(int(BEAT_SECONDS * 1000))
            # While this process itself is stopped, it hears nothing: that is nobody's silence.
            before, passed = time.monotonic(), time.monotonic() - before
            for index in self._silent:
                self._silent[index] += min(passed, 2 * BEAT_SECONDS)
            while self._bell.poll(0):
                self._bell.recv()
            is_over = self._is_over
            while not self._outgoing.empty():
                decoder, frames = self._outgoing.get()
                self._sockets[decoder or 0].send_multipart(frames)
            if is_over:
                return
            for index in range(len(self._sockets)):
                while self._monitors[index].poll(0):
                    self._connection(index, self._monitors[index].recv_multipart())
                while self._sockets[index].poll(0):
                    self._silent[index] = 0.0
                    self._receive(index, self._sockets[index].recv_multipart(copy=False))
            self._notice_lost()
            self._end_a_rank_that_loads()

    def _connection(self, index: int, frames: list[bytes]) -> None:
        event = parse_monitor_message(frames)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._lost_since.pop(index, None)
            self._sockets[index].send_multipart(self._hello(index))
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._stop(KeyIsOld("the run does not know this rank's key: it was started anew"))
        else:
            self._lost_since.setdefault(index, time.monotonic())

    def _notice_lost(self) -> None:
        now = time.monotonic()
        for index, decoder in enumerate(self._decoders):
            if index in self._ends or self._trouble is not None:
                continue
            about = f"the decoder rank of replica {decoder.replica} at {decoder.address}"
            if now - self._lost_since.get(index, now) > LOST_SECONDS:
                why = f"is gone: no connection for {LOST_SECONDS:.0f} s"
            elif self._silent[index] > self._silence_seconds:
                why = (
                    f"has said nothing for {self._silence_seconds:.0f} s: its process is stopped, "
                    "or its node is down"
                )
            else:
                continue
            self._stop(DecoderLost(f"{about} {why}"))

    def _end_a_rank_that_loads(self) -> None:
        """Ends this process where nobody waits any more for it to load. Nothing else can end it:
        the program is in a read."""
        if self._prints is not None or (self.end is None and self._trouble is None):
            return
        now = time.monotonic()
        self._over_since = self._over_since or now
        if now - self._over_since > LOADING_SECONDS:
            about = self._trouble or "the run has ended"
            print(
                f"error: {about}, and this rank has not loaded the U-Net {LOADING_SECONDS:.0f} s "
                "later: it ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(exit_codes.DONE if self.end is RunEnd.DONE else exit_codes.FAILURE)

    def _receive(self, index: int, frames: list[Any]) -> None:
        message, number, parts = wire.unpack(frames, self._limits)
        if message is Message.ASK:
            request = wire.unpack_request(parts, self._limits)
            self.prepare(request.rows)
            self._received.put(ReceivedRequest(index, number, request))
        elif message is Message.PREPARE:
            self.prepare(wire.unpack_prepare(parts, self._limits))
        elif message is Message.UNKNOWN:
            self._sockets[index].send_multipart(self._hello(index))
        elif message is Message.REFUSED:
            self._stop(NotAdmitted(str(wire.unpack_words(parts).get("why"))))
        elif message is Message.BYE:
            self._ends[index] = RunEnd(number)
            if self.end is not None:
                self._received.put(None)
        elif message not in (Message.BEAT, Message.WELCOME):
            raise BadMessage(f"{message.name}, which is not for a score rank")
