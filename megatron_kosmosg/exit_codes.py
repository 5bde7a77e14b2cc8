"""What an exit code says: one table for all commands, the quickstart and slurm/common.sh.

docs/running.md explains it to users.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

DONE = 0
FAILURE = 1
"""It went wrong on the way; the same command may succeed."""
BAD_INPUT = 2
"""Arguments, settings or inputs: the same command would fail again."""
MISSED = 3
"""It ran, and its numbers are not good enough: a threshold is missed, or they are not finite."""
STOPPED = 85
"""A requested stop of training: state is saved, the run wants to be started again."""
INTERRUPTED = 130
"""Ctrl-C, as of a program that SIGINT ends."""


def leave(code: int) -> NoReturn:
    """Ends the process.

    After a requested stop at once: a thread may still build an index that nobody will read.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code == STOPPED:
        os._exit(code)
    sys.exit(code)
