"""The process with the fake GPU, as others talk to it; imports no torch.

It changes torch for good, so that nothing else can be done in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.cuda_guard import why_not

SERVER = "megatron_kosmosg.rehearsal.server"


_BESIDE = Path(__file__).parents[2]


class FakeDeviceError(RuntimeError):
    """The process with the fake GPU cannot go on."""


class FakeDevice:
    """Context manager; the process starts with the first case."""

    def __init__(self, server: str = SERVER) -> None:
        """server: module that is the process; another one changes libraries before the first case.

        Raises ConfigError where this machine cannot pretend to have a GPU.
        """
        self._server = server
        reason = why_not()
        if reason is not None:
            raise ConfigError(f"nothing can be rehearsed here: {reason}")
        self._folder = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[str] | None = None
        self._stderr: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")

    def __enter__(self) -> FakeDevice:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            # It keeps nothing, and may be amid a case that nobody wants any more.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._stderr.close()
        self._folder.cleanup()

    def run(self, case: RehearsalCase) -> dict:
        """What the case's function returned, or {"error": {"message", "phase", "place", "lines"}}.

        Raises FakeDeviceError when the process itself ends.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", self._server, self._folder.name],
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(_BESIDE), *_python_path()])},
                start_new_session=True,  # so that it ends as a whole, with the case that it runs
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
            )
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise FakeDeviceError("the fake device has no pipes")
        try:
            process.stdin.write(json.dumps(dataclasses.asdict(case)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise FakeDeviceError(f"the fake device ended by itself: {self._last_words()}")
        return json.loads(answer)

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()]
        return lines[-1] if lines else "it said nothing"


def _python_path() -> list[str]:
    path = os.environ.get("PYTHONPATH")
    return [path] if path else []
