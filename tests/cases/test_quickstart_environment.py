"""examples/quickstart.sh and a virtual environment that was active for something else."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.commands import REPOSITORY

PYTHON = """\
#!/bin/sh
echo "$@" >> {log}
case "$*" in *"pip install"* | *"-m venv"*) exit 1;; esac
exec {python} "$@"
"""
"""Notes what it is asked for; installs nothing and makes no environment."""


def test_the_active_environment_is_left_alone_or_named_first(tmp_path):
    other, log = tmp_path / "other-project", tmp_path / "log"
    (other / "bin").mkdir(parents=True)
    for name in ("python", "python3", "python3.11", "python3.12"):
        python = other / "bin" / name
        python.write_text(PYTHON.format(log=log, python=sys.executable))
        python.chmod(0o755)
    done = subprocess.run(
        ["bash", REPOSITORY / "examples" / "quickstart.sh", "--out", tmp_path / "out", "--fast"],
        env={
            **os.environ,
            "VIRTUAL_ENV": str(other),
            "PATH": f"{other / 'bin'}:{os.environ['PATH']}",
            "KOSMOSG_VENV": str(tmp_path / "own"),
        },
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    installs = "pip install" in (log.read_text() if log.exists() else "")
    assert not installs or ("active" in done.stdout and "KOSMOSG_VENV" in done.stdout), done.stdout
