"""What is already done: one JSON stamp per step, keyed by its command, its inputs and the keys of
the steps before it. A changed key means the step runs anew, an equal one that it continues."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from megatron_kosmosg.files import remove, write_json
from quickstart.steps import Step


class Stamps:
    """The folder `OUT/steps`. `steps` come in the order in which they run."""

    def __init__(self, folder: Path, steps: list[Step], repository: Path) -> None:
        self._folder = folder
        self._code = _code_fingerprint(repository)
        self._keys: dict[str, str] = {}
        for step in steps:
            self._keys[step.name] = self._key(step)
        folder.mkdir(parents=True, exist_ok=True)

    def _key(self, step: Step) -> str:
        """Hash of everything that decides the step's result, except the code."""
        digest = hashlib.sha256(json.dumps(step.command).encode())
        for path in step.inputs:
            digest.update(path.read_bytes() if path.is_file() else b"absent")
        for name in step.after:
            digest.update(self._keys[name].encode())
        return digest.hexdigest()

    def read(self, step: Step) -> dict | None:
        """The stamp of this very step, finished or not; None when its key differs."""
        path = self._path(step)
        if not path.is_file():
            return None
        stamp = json.loads(path.read_text(encoding="utf-8"))
        return stamp if stamp["key"] == self._keys[step.name] else None

    def is_done(self, step: Step) -> bool:
        """True when the step finished with this key and its outputs are still there."""
        stamp = self.read(step)
        return bool(stamp and stamp["done"] and all(path.exists() for path in step.outputs))

    def is_current_code(self, stamp: dict) -> bool:
        """False when the stamp was written by another version of the code."""
        return stamp["code"] == self._code

    def begin(self, step: Step) -> dict:
        """The stamp to continue from; a step whose key changed loses its old outputs."""
        stamp = self.read(step)
        if stamp is None or stamp["done"]:
            for path in step.outputs:
                remove(path)
            stamp = {"key": self._keys[step.name], "seconds": 0.0, "cpu_seconds": 0.0}
        stamp |= {"done": False, "code": self._code}
        self.write(step, stamp)
        return stamp

    def write(self, step: Step, stamp: dict) -> None:
        """Replace the step's stamp atomically."""
        write_json(self._path(step), stamp)

    def _path(self, step: Step) -> Path:
        return self._folder / f"{step.name}.json"


def _code_fingerprint(repository: Path) -> str:
    digest = hashlib.sha256()
    for folder in ("megatron_kosmosg", "tools"):
        for path in sorted((repository / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
