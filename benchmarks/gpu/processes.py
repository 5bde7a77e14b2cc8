"""A process of a run, within its time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

OUT_OF_TIME = "ended after"
TO_WRITE = 20.0
"""Seconds for what is interrupted to write what it has."""


def last_words(
    command: list[str],
    seconds: float,
    log: Path,
    *,
    cwd: Path,
    env: dict[str, str],
    to_write: float = TO_WRITE,
) -> str:
    """ "" for a command that ended well, else the end of what it said, in `log`.

    One that takes longer is interrupted, so that it writes what it has, and the words begin with
    OUT_OF_TIME. What it started (compilers, ranks, readers) does not outlive it.
    """
    is_cut = False
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Below nohup, or in a script's background, SIGINT is ignored, also by what is started.
            preexec_fn=_hear_interrupts,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            is_cut = True
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(to_write)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    words = log.read_text(errors="replace").strip()[-500:]
    if is_cut:
        return f"{OUT_OF_TIME} {seconds:.0f} s: {words}"
    return "" if process.returncode == 0 else words or f"code {process.returncode}"


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
