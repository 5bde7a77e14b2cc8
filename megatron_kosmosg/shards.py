"""Work that is cut into shards: finished ones are kept, and a killed run goes on without them.

A shard is done when its mark is there, a file that appears whole and after all else that the shard
leaves. What all of them are made with is noted first; the same folder is refused to other settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kosmosg.files import remove, remove_folder, write_json

_SHOWN_CHARACTERS = 200
"""Of a setting that changed; a longer one is only named."""


@dataclass(frozen=True)
class ShardFolder:
    """The marks of finished shards, and what they are made with. Any process may hold one."""

    path: Path
    mark: str = "{:08d}.json"
    """Name of a shard's mark, with its number."""
    settings_file: str = "job.json"
    advice: str = "go on with those, or delete the folder to start anew"
    """What to do where it was begun with other settings."""

    @property
    def is_begun(self) -> bool:
        """Whether the settings of the work are noted; without them, what lies in the folder says
        nothing."""
        return self._settings.exists()

    def begin(self, settings: dict[str, Any], names: Mapping[str, str] | None = None) -> None:
        """Notes everything that the shards depend on, or compares it with what is noted.

        names: of settings, for people. Processes that may begin together do it under a lock.
        Raises ValueError where the folder was begun with other settings.
        """
        settings = json.loads(json.dumps(settings))
        if not self.is_begun:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self._settings, settings)
            return
        before = json.loads(self._settings.read_text(encoding="utf-8"))
        names = names or {}
        changed = [
            _change(names[name] if name in names else name, before.get(name), settings.get(name))
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.path} was begun with other settings ({'; '.join(changed)}); {self.advice}"
            )

    def mark_of(self, number: int) -> Path:
        """The file that says that a shard is done, whether or not it is there yet."""
        return self.path / self.mark.format(number)

    def is_done(self, number: int) -> bool:
        """Whether a shard is finished."""
        return self.mark_of(number).exists()

    def to_do(self, numbers: Iterable[int]) -> list[int]:
        """The shards that are not finished."""
        return [number for number in numbers if not self.is_done(number)]

    def finish(self, number: int, note: Any) -> None:
        """Marks a shard whose other files are written; note: what is to be known of it, as JSON."""
        write_json(self.mark_of(number), note, indent=None)

    def read(self, number: int) -> Any:
        """The values that `finish` noted for a shard."""
        return json.loads(self.mark_of(number).read_text(encoding="utf-8"))

    def clear(self, keep: Iterable[str] = ()) -> None:
        """Deletes all but the files `keep`. Killed at any moment, it is a folder not begun."""
        self._settings.unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name not in keep:
                remove(path)

    def remove(self) -> None:
        """Deletes the folder. Killed at any moment, half of it never has its name."""
        remove_folder(self.path, only_writer=True)

    @property
    def _settings(self) -> Path:
        return self.path / self.settings_file


def _change(name: str, before: Any, now: Any) -> str:
    values = f"{before} -> {now}"
    return f"{name}: {values}" if len(values) <= _SHOWN_CHARACTERS else name
