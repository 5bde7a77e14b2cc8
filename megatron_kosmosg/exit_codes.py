"""What an exit code says: one table for all commands, the quickstart and slurm/common.sh.

docs/running.md explains it to users.
"""

from __future__ import annotations

import errno
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
READER_LEFT = 141
"""Nobody reads stdout any longer (`| head`), as of a program that SIGPIPE ends."""


def of_os_error(error: OSError) -> int:
    """FAILURE for what may pass by itself; BAD_INPUT for the rest: what is not there, what may not
    be read or written, a full disk."""
    of_servers = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
    of_a_busy_machine = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE)
    return FAILURE if error.errno in (*of_servers, *of_a_busy_machine) else BAD_INPUT


def of_a_reader_that_left() -> int:
    """The code where nobody reads stdout any longer (`| head`); from here on it goes nowhere."""
    silence_stdout()
    return READER_LEFT


def silence_stdout() -> None:
    """Lets what is printed from here on, and what waits in the buffer, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """Ends the process.

    After a requested stop at once: a thread may still build an index that nobody will read.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = of_a_reader_that_left()
    except OSError as error:  # stdout is a file on a full disk
        silence_stdout()
        print(f"error: what is printed cannot be written: {error}", file=sys.stderr)
        code = BAD_INPUT
    if code == STOPPED:
        os._exit(code)
    sys.exit(code)
