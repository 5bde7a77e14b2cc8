"""What belongs to one browser tab: its folder, and how its work is stopped."""

from __future__ import annotations

import re
import shutil
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Session:
    """The state of one browser tab."""

    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)


class Sessions:
    """All tabs, by the name that the page gives them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def begin(self, name: str | None) -> tuple[threading.Event, Path]:
        """Begins one piece of work: returns (an event that is set when the work is to stop, a new
        folder for what it makes).

        Args:
            name: None is a caller without a tab, whom nobody can stop.
        """
        with self._lock:
            key = name or uuid.uuid4().hex
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key):
                key = uuid.uuid4().hex
            session = self._sessions.setdefault(key, Session(self._folder / key))
            session.stop = threading.Event()
            folder = session.folder / uuid.uuid4().hex[:8]
            folder.mkdir(parents=True)
            return session.stop, folder

    def stop(self, name: str | None) -> bool:
        """Whether there was anything that may stop."""
        with self._lock:
            session = self._sessions.get(name or "")
            if session is None or session.stop.is_set():
                return False
            session.stop.set()
            return True

    def leave(self, name: str | None) -> None:
        """Stops the work of a closed tab and removes its folder."""
        self.stop(name)
        with self._lock:
            session = self._sessions.pop(name or "", None)
        if session is not None:
            shutil.rmtree(session.folder, ignore_errors=True)
