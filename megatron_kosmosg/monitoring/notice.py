"""Tells somebody when a run starts, fails or ends: a webhook or a command of the user's own.

A notice that does not get through is said in one line and never ends a run.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from megatron_kosmosg import exit_codes
from megatron_kosmosg.config.paths import FAILURE_FILE
from megatron_kosmosg.launcher import find_job, node_name

SECONDS = 10.0
"""That a webhook or a command may take."""


class Notices:
    """The notices of one start, on rank 0; without a target nobody is told."""

    def __init__(
        self, target: str | None, stage: str, folder: Path, log: Callable[[str], None]
    ) -> None:
        """A notice is sent when a method is called.

        Args:
            target: http(s)://..., which gets JSON by POST, or a command line, which gets it on
                stdin.
            log: is told what went wrong with a notice.
        """
        self._target, self._stage, self._folder, self._log = target, stage, folder, log

    def started(self) -> None:
        self._send("start", None, None)

    def ended(self, code: int) -> None:
        """Tells that this start has ended with the exit code `code`."""
        events = {exit_codes.DONE: "end", exit_codes.STOPPED: "stop"}
        event = events.get(code, "failure")
        self._send(event, code, self._first_error() if event == "failure" else None)

    def _first_error(self) -> str | None:
        try:
            text = (self._folder / FAILURE_FILE).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        return text.strip().rpartition("\n")[2]

    def _send(self, event: str, code: int | None, error: str | None) -> None:
        if self._target is None:
            return
        job, restart = find_job()
        content = {
            "event": event,
            "stage": self._stage,
            "run": str(self._folder.absolute()),
            "time": round(time.time(), 3),
            "node": node_name(),
            "job": job,
            "restart": restart,
            "exit_code": code,
            "error": error,
            "text": f"{self._stage} in {self._folder}: {event}" + (f": {error}" if error else ""),
        }
        data = json.dumps(content).encode()
        try:
            if is_webhook(self._target):
                _post(self._target, data)
            else:
                subprocess.run(
                    shlex.split(self._target), input=data, timeout=SECONDS, check=True,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
        except (OSError, ValueError, subprocess.SubprocessError) as problem:
            # The address may have a secret in its path: the host is enough.
            where = urlsplit(self._target).hostname if is_webhook(self._target) else self._target
            reason = str(problem).replace(self._target, str(where))
            self._log(f"the notice of the {event} did not get through to {where}: {reason}")


def is_webhook(target: str) -> bool:
    """Whether a target is an address, and not a command line."""
    return target.startswith(("http://", "https://"))


def _post(address: str, data: bytes) -> None:
    request = urllib.request.Request(
        address, data, {"Content-Type": "application/json", "User-Agent": "megatron-kosmosg"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS):
        return
