"""The largest memory of a command, in a process of its own with nothing imported before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.commands import CommandFailed

STARTER = """\
import os, resource, sys
code = os.spawnv(os.P_WAIT, sys.argv[1], sys.argv[1:])
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Starts a command from a small process: from a large one, the child would count its pages."""


def peak_memory(script: Path, *arguments: object) -> tuple[float, str]:
    """(MB resident at the peak, what it wrote). Raises CommandFailed."""
    command = [sys.executable, "-SE", "-c", STARTER, sys.executable, script, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    written, _, last = done.stdout.rstrip().rpartition("\n")
    code, kilobytes = last.split()
    if code != "0":
        raise CommandFailed(done.stderr)
    return int(kilobytes) / 1e3, written + done.stderr
