"""Signs of life of all ranks, and who holds the others up when nothing moves.

A thread of each rank leaves what its main thread does in the store of the rendezvous; rank 0 reads
all of them, and the last rank reads rank 0's. Another thread watches what was read: rank 0 has the
store, and who asks a rank 0 that is frozen waits for ever. The watch reports; ending a run that
hangs is left to the timeout of the collective that the others wait in.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from megatron_kosmosg.files import write_json
from megatron_kosmosg.launcher import RankInfo, node_name
from megatron_kosmosg.monitoring.stall_detector import Heartbeat, StallDetector
from megatron_kosmosg.parallel.rendezvous import connect_to_store
from megatron_kosmosg.terminal_text import say

PACKAGE = str(Path(__file__).parents[1])


class Watchdog:
    """Context manager of one rank; `at` says what it does from now on."""

    def __init__(
        self, rank_info: RankInfo, stall_seconds: float, file: Path, *, may_go: bool = False
    ) -> None:
        """Entering the context starts the signs of life.

        Args:
            rank_info: of this rank.
            stall_seconds: time without progress after which a report is made.
            file: JSON file that rank 0 keeps up to date.
            may_go: whether the run goes on without this rank.
        """
        self._rank_info, self._stall_seconds, self._file = rank_info, stall_seconds, file
        self._may_go = may_go
        self._interval = max(0.1, min(10.0, stall_seconds / 4))
        self._node = node_name()
        self._main = threading.get_ident()
        self._state = (0, "start", time.monotonic())
        self._number = 0
        self._ended = threading.Event()
        watched = {0: range(rank_info.world_size), rank_info.world_size - 1: range(1)}
        self._detector = StallDetector(watched.get(rank_info.rank, range(0)), stall_seconds)
        self._heartbeats: dict[int, Heartbeat | None] = dict.fromkeys(self._detector.ranks)
        """The latest that was read."""
        self._threads = [
            threading.Thread(target=work, name="heartbeat", daemon=True)
            for work in (self._exchange, self._look)
        ]

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=1.0)  # one may be waiting for a rank 0 that has left

    def at(self, iteration: int, phase: str) -> None:
        """The main thread begins `phase` of this iteration."""
        self._state = (iteration, phase, time.monotonic())

    def _exchange(self) -> None:
        store: dist.Store | None = None
        while not self._ended.wait(self._interval):
            local = self._heartbeat()
            try:
                if store is None:
                    store = connect_to_store(
                        self._rank_info, timedelta(seconds=2 * self._interval + 10)
                    )
                store.set(_key(local.rank), json.dumps(asdict(local)))
                self._heartbeats = {rank: _read(store, rank) for rank in self._detector.ranks}
            except (RuntimeError, OSError):  # rank 0 has the store: it is gone, or ending
                store = None

    def _look(self) -> None:
        awake, before = 0.0, time.monotonic()
        while not self._ended.wait(self._interval):
            # While this process itself is stopped, it hears nothing: that is nobody's silence.
            now = time.monotonic()
            awake, before = awake + min(now - before, 2 * self._interval), now
            report = self._detector.report(self._heartbeats, awake)
            if report is not None and not self._ended.is_set():
                say(report)
            if self._rank_info.rank == 0:
                self._write()

    def _heartbeat(self) -> Heartbeat:
        iteration, phase, since = self._state
        frames = working_frames(self._main)
        places = [place for frame in frames if (place := innermost_line(frame)) != "?"]
        self._number += 1
        return Heartbeat(
            rank=self._rank_info.rank,
            node=self._node,
            number=self._number,
            iteration=iteration,
            phase=phase,
            seconds=time.monotonic() - since,
            place=places[0] if places else "?",
            waits=any(is_waiting(frame) for frame in frames),
            may_go=self._may_go,
        )

    def _write(self) -> None:
        iteration, phase, _ = self._state
        content = {"time": time.time(), "iteration": iteration, "phase": phase}
        try:
            write_json(
                self._file,
                {**content, "stall": self._detector.stall},
                indent=None,
                only_writer=True,
            )
        except OSError:  # a full disk must not end the watch; the run itself will say it
            return


def working_frames(main: int) -> list[FrameType]:
    """The stacks of the threads that train: first those that torch began, then thread `main`.

    On a GPU torch runs backward passes in a thread of its own, and a wait for a gradient is there.
    """
    ours = {
        thread.ident
        for thread in threading.enumerate()
        if not isinstance(
            thread, threading._DummyThread
        )  # stands for one that Python did not begin
    }
    found = sys._current_frames()
    torchs = [frame for number, frame in found.items() if number not in ours and number != main]
    return [*torchs, found[main]] if main in found else torchs


def innermost_line(frame: FrameType | None) -> str:
    """The innermost line of this package on a stack, as "training/step.py:81"; "?" where the stack
    is outside."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


_WAITING = ("torch/distributed/", "p2p_communication", "score/fleet.py", "score/member.py")
"""In the names of files whose functions wait for other ranks."""


def is_waiting(frame: FrameType | None) -> bool:
    """Whether the stack is inside torch.distributed, Megatron-Core's exchange between pipeline
    stages, or the links between decoder and score ranks."""
    while frame is not None:
        name = frame.f_code.co_filename
        if any(part in name for part in _WAITING):
            return True
        frame = frame.f_back
    return False


def _read(store: dist.Store, rank: int) -> Heartbeat | None:
    if not store.check([_key(rank)]):
        return None
    return Heartbeat(**json.loads(store.get(_key(rank))))


def _key(rank: int) -> str:
    return f"kosmosg/heartbeat/{rank}"
