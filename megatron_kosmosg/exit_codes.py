"""What an exit code says: one table for all commands, the quickstart and slurm/common.sh.

docs/running.md explains it to users.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

DONE = 0
FAILURE = 1
"""It went wrong on the way and may succeed another time, or it found what it looked for bad."""
BAD_INPUT = 2
"""Arguments, settings or inputs: the same command would fail again."""
MISSED = 3
"""A limit is missed: thresholds of quality, a tolerance, the number of bad records or images or of
updates that are not finite."""
STOPPED = 85
"""A requested stop of training: state is saved, the run wants to be started again."""
INTERRUPTED = 130
"""Ctrl-C, as of a program that SIGINT ends."""


def of_a_reader_that_left() -> int:
    """The code where nobody reads stdout any longer (`| head`); from here on it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILURE


def leave(code: int) -> NoReturn:
    """Ends the process.

    After a requested stop at once: a thread may still build an index that nobody will read.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = of_a_reader_that_left()
    if code == STOPPED:
        os._exit(code)
    sys.exit(code)
