"""What the task of a lost score rank sees of the run, without torch: whether it still goes on.

Nobody else of the job may be left to see that rank 0 stands still.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from socket import create_connection, socket
from typing import Any
from urllib.parse import urlsplit

from megatron_kosmosg import exit_codes
from megatron_kosmosg.config.paths import SCORE_RANKS_FILE
from megatron_kosmosg.monitoring.run_owner import BEAT_SECONDS, OWNER_FILE
from megatron_kosmosg.terminal_text import say

GONE_SECONDS = 10.0
"""Without a connection to the first decoder rank for so long, it is gone."""
FEWEST_SECONDS = 3 * BEAT_SECONDS
"""Rank 0 is never called silent before."""
LOOK_SECONDS = 1.0
_CONNECT_SECONDS = 2.0


class RunWatch:
    """The run in `folder`, of which this process is no part any more."""

    def __init__(self, folder: Path, stall_seconds: float, timeout_seconds: float) -> None:
        """Nothing is looked at yet.

        Args:
            folder: the run's folder.
            stall_seconds: without a sign of life of rank 0 for so long, that is said.
            timeout_seconds: without one for so long, it counts as dead.
        """
        self.folder = folder
        self._stall_seconds, self._timeout_seconds = stall_seconds, timeout_seconds

    def until_its_end(self, name: str, start: str | None) -> int:
        """Returns when a start of the run has ended: 0, or 1 where its first decoder rank is gone
        or gives no sign of life. The job then ends, too.

        Args:
            name: of the lost rank, told to people.
            start: the one that it had joined; None: the next one that listens, if one does within
                `timeout_seconds`.
        """
        began = heard = connected = time.monotonic()
        sign: int | None = None
        line: _Line | None = None
        is_told = False
        while True:
            time.sleep(LOOK_SECONDS)
            now, found = time.monotonic(), _published(self.folder)
            if start is not None and (found is None or found.start != start):
                return exit_codes.DONE
            if line is None and found is not None:
                line = _Line(found.host, found.port)
            if found is None or line is None or not line.holds():
                if start is not None and now - connected > GONE_SECONDS:
                    say(f"{name} was lost, and now the first decoder rank is gone: no connection")
                    return exit_codes.FAILURE
                if start is None and now - began > self._timeout_seconds:
                    return exit_codes.DONE
                if start is None:
                    line = None  # what was found may be left of a start that was killed
                continue
            start, connected = found.start, now
            latest = self._latest_sign()
            if latest != sign:
                heard, sign, is_told = now, latest, False
            silence = now - heard
            if silence > max(FEWEST_SECONDS, self._timeout_seconds):
                say(f"no sign of life from rank 0 for {silence:.0f} s: this job should end")
                return exit_codes.FAILURE
            if silence > max(FEWEST_SECONDS, self._stall_seconds) and not is_told:
                say(f"stall: no sign of life from rank 0 ({silence:.0f} s)")
                is_told = True

    def _latest_sign(self) -> int | None:
        """The time, by the file server's clock, at which rank 0 last touched its claim."""
        try:
            return (self.folder / OWNER_FILE).stat().st_mtime_ns
        except OSError:
            return None


@dataclass(frozen=True)
class _Published:
    start: str
    host: str
    port: int


def _published(folder: Path) -> _Published | None:
    """The start that can be joined, and where its first decoder rank listens; None: there is
    none."""
    try:
        found: dict[str, Any] = json.loads((folder / SCORE_RANKS_FILE).read_text(encoding="utf-8"))
        address = urlsplit(found["decoders"][0]["address"])
        return _Published(found["start"], address.hostname or "", address.port or 0)
    except (OSError, ValueError, LookupError, TypeError):
        return None


class _Line:
    """A TCP connection that says nothing: it holds while the other end's process is there, also
    while that is stopped."""

    def __init__(self, host: str, port: int) -> None:
        self._to = host, port
        self._socket: socket | None = None

    def holds(self) -> bool:
        """Whether it could be made, or still holds."""
        try:
            if self._socket is None:
                self._socket = create_connection(self._to, _CONNECT_SECONDS)
                self._socket.setblocking(False)
            while self._socket.recv(4096):
                pass
        except BlockingIOError:
            return True
        except OSError:
            self._close()
            return False
        self._close()  # who does not introduce itself is sent away: the next look tells
        return True

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None
