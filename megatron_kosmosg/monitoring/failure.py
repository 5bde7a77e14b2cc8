"""Whose error is shown when a run fails: the first one, once.

When one rank raises, its peers fail later with errors about lost connections. The first rank to
claim `failure.txt` in the output folder writes its traceback there and to stderr; of those that
find the file claimed, rank 0 alone names it in one line. An error of a rank without which the run
goes on is no failure of the run: it has a file of its own.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from megatron_kosmosg import exit_codes
from megatron_kosmosg.config.errors import ConfigError, InputError
from megatron_kosmosg.config.paths import FAILURE_FILE
from megatron_kosmosg.data.bad_images import TooManyBadImages
from megatron_kosmosg.data.remote_file import StorageError
from megatron_kosmosg.files import OF_THE_DISK
from megatron_kosmosg.monitoring.lost_ranks import note_lost_rank
from megatron_kosmosg.terminal_text import printable_lines


def forget_failure(folder: Path, started: float) -> None:
    """Removes the claim of an earlier run: one from before `started`, this run's start in seconds
    since 1970. Ranks do not start together: another may already have failed in this run.

    A folder that cannot be used is no concern here: config/validate.py says what is wrong with it.
    """
    path = folder / FAILURE_FILE
    with suppress(OSError):
        if path.stat().st_mtime < started:
            path.unlink()


def report_failure(folder: Path, rank: int, error: BaseException, started: float) -> bool:
    """True if this rank's error is the first, which is then shown; False if it was late.

    The file gets the traceback. On stderr, an error that the user can repair is its message alone.
    started: as for `forget_failure`.
    """
    forget_failure(folder, started)  # the rank that does so at the start may not have come to it
    full = f"rank {rank} failed:\n" + "".join(traceback.format_exception(error))
    shown = f"error: {str(error) or type(error).__name__}" if _explains_itself(error) else full
    if _is_of_the_disk(error):
        shown = (
            f"error: the disk takes nothing more ({error}); what was saved before is whole: make "
            "room or let the run write elsewhere (logging.output_dir, checkpoint.save), then "
            "start again"
        )
    shown = printable_lines(shown)
    path = folder / FAILURE_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except OSError as problem:
        if isinstance(problem, FileExistsError) and path.is_file():
            if rank == 0:
                print(f"the run ends because of the failure in {path}", file=sys.stderr, flush=True)
            return False
        print(shown, file=sys.stderr, flush=True)  # no folder to agree in: every rank speaks
        return True
    print(shown, file=sys.stderr, flush=True)
    with suppress(OSError), os.fdopen(descriptor, "w") as file:  # the disk may be what failed
        file.write(full)
        file.flush()
        now = time.time()
        os.utime(descriptor, (now, now))  # by this machine's clock: a file server's may differ
    return True


def report_lost_rank(folder: Path, name: str, error: BaseException) -> None:
    """Writes the traceback of a rank without which the run goes on to stderr, and to the end of
    `lost_ranks.txt`."""
    note_lost_rank(folder, name, "failed", "".join(traceback.format_exception(error)))


def raise_together(check: Callable[[], None]) -> None:
    """Runs `check` on every rank; when any raises ConfigError, all raise the lowest rank's.

    For checks whose answer may differ between nodes, so that no rank waits for one that left.
    """
    problem = None
    try:
        check()
    except ConfigError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise ConfigError(found)


def exit_code_of(error: BaseException) -> int:
    """The code with which a rank of training that raised `error` ends."""
    if isinstance(error, KeyboardInterrupt):
        return exit_codes.INTERRUPTED
    if isinstance(error, (FloatingPointError, TooManyBadImages)):
        return exit_codes.MISSED
    of_the_input = isinstance(error, InputError) or _is_of_the_disk(error)
    return exit_codes.BAD_INPUT if of_the_input else exit_codes.FAILURE


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether the error is of a disk that is full, read-only or over its quota: no new start
    changes that."""
    return isinstance(error, OSError) and error.errno in OF_THE_DISK


def _explains_itself(error: BaseException) -> bool:
    """Whether the message is written for users: about a setting, an input or the numbers."""
    known = (InputError, StorageError, FloatingPointError, TooManyBadImages, KeyboardInterrupt)
    return isinstance(error, known)
