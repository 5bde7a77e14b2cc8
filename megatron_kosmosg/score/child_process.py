"""A score rank of a run's job works in a child process, so that its death is no failure of a task.

Slurm (`srun --kill-on-bad-exit`), torchrun and `kosmosg launch` end all ranks of a job when one of
them ends badly. A frozen U-Net that the kernel has killed for its memory, or that crashed, must not
end training: the others answer in its place. The task stays until the run ends: `srun --wait` ends
all tasks some time after the first, however that one ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from megatron_kosmosg import exit_codes
from megatron_kosmosg.monitoring.lost_ranks import note_lost_rank
from megatron_kosmosg.score.run_watch import RunWatch

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals at which a task whose rank is lost ends. USR1 asks the run to save, which may take
long."""
_JOINED, _LOST = "joined ", "lost"
"""What the child says: which start it works for, and that the run goes on without it."""
_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent dies."""


class ScoreRankLost(RuntimeError):
    """A score rank of the run's job, which this names, ends with the error that caused it; the run
    goes on without it."""


class OwnProcess:
    """The child's end of the pipe to its parent."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def has_joined(self, start: str) -> None:
        """Says which start of the run this rank works for."""
        os.write(self._pipe, f"{_JOINED}{start}\n".encode())

    def is_lost(self) -> None:
        """Says that this rank ends, and the run goes on without it."""
        os.write(self._pipe, f"{_LOST}\n".encode())


def go_on_as_child(name: str, run: RunWatch) -> OwnProcess:
    """Returns in a child of this process. This process waits for it, passes signals on and ends
    with its exit code. Where a signal that did not come through here has ended it, or it says that
    it is lost, this process stays until the run ends.

    Call before anything is loaded. name: of the rank, told to people.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    heard, said = os.pipe()
    os.set_blocking(heard, False)
    # Held back until there is a child that they can go to.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    child = os.fork()
    if child == 0:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        os.close(heard)
        return OwnProcess(said)
    os.close(said)
    code = _exit_code_of(child, name, heard, run)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _exit_code_of(child: int, name: str, heard: int, run: RunWatch) -> int:
    forwarded: set[int] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        forwarded.add(number)
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in _FORWARDED:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    _, status = os.waitpid(child, 0)
    code, lines = os.waitstatus_to_exitcode(status), _said(heard)
    if code >= 0 and _LOST not in lines:
        return code
    if -code in forwarded:
        return 128 - code
    if code < 0:
        note_lost_rank(run.folder, name, f"was ended by {signal.Signals(-code).name}")
    for number in _FORWARDED:
        signal.signal(number, _end if number in _ENDING else signal.SIG_IGN)
    joined = [line.removeprefix(_JOINED) for line in lines if line.startswith(_JOINED)]
    return run.until_its_end(name, joined[0] if joined else None)


def _said(heard: int) -> list[str]:
    """All lines that the child has said."""
    try:
        return os.read(heard, 1000).decode().splitlines()
    except BlockingIOError:  # nothing, and a process of the child's has the other end
        return []


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(exit_codes.DONE)
