"""A score rank of a run's job works in a child process, so that its death is no failure of a task.

Slurm (`srun --kill-on-bad-exit`), torchrun and `kosmosg launch` end all ranks of a job when one of
them ends badly. A frozen U-Net that the kernel has killed for its memory, or that crashed, must not
end training: the others answer in its place.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent dies."""


class ScoreRankLost(RuntimeError):
    """A score rank of the run's job, which this names, ends with the error that caused it; the run
    goes on without it."""


def go_on_as_child(name: str) -> None:
    """Returns in a child of this process. This process waits for it, passes signals on and ends
    with its exit code, or with 0 where a signal that did not come through here ended it.

    Call before anything is loaded. name: of the rank, told to people.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Held back until there is a child that they can go to.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    child = os.fork()
    if child == 0:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        return
    os._exit(_exit_code_of(child, name))


def _exit_code_of(child: int, name: str) -> int:
    told: set[int] = set()

    def pass_on(number: int, frame: object) -> None:
        told.add(number)
        os.kill(child, number)  # it is there until it has been waited for

    for number in _FORWARDED:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    if -code in told:
        return 128 - code
    when, what = time.strftime("%Y-%m-%d %H:%M:%S"), signal.Signals(-code).name
    os.write(2, f"{when} {name} was ended by {what}; the run goes on without it\n".encode())
    return 0
