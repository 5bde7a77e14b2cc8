"""Commands as a shell runs them, in processes that have already imported what they need."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SECONDS = 120
"""After which a command that waits for something is killed."""


class CommandFailed(RuntimeError):
    """A command that a test only prepares with failed: this is not what the test asserts."""


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it wrote."""

    code: int | None
    """Of its end; -N for signal N, None where it had to be killed."""
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both streams."""
        return self.out + self.err

    def must_succeed(self) -> Ran:
        """Itself. Raises CommandFailed for another exit code than 0."""
        if self.code != 0:
            raise CommandFailed(f"exit code {self.code}\n{self.out}\n{self.err}")
        return self


class Commands:
    """The repository's commands, run by one Python."""

    def __init__(self, python: Path) -> None:
        self._python = python

    def tool(self, name: str, *arguments: object, **how) -> Ran:
        """`tools/NAME.py ARGUMENTS`; how: as for `run`."""
        return self.run(REPOSITORY / "tools" / f"{name}.py", *arguments, **how)

    def example(self, name: str, *arguments: object, **how) -> Ran:
        """`python examples/inference/NAME.py ARGUMENTS`."""
        return self.run(REPOSITORY / "examples" / "inference" / f"{name}.py", *arguments, **how)

    def train(self, *arguments: object, **how) -> Ran:
        """`python -m megatron_kosmosg.train ARGUMENTS`."""
        return self.run("-m", "megatron_kosmosg.train", *arguments, **how)

    def run(
        self,
        *arguments: object,
        cwd: Path | None = None,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        seconds: float = SECONDS,
    ) -> Ran:
        """`python ARGUMENTS` in the folder `cwd`; `environment` is added to this process's."""
        command = [str(self._python), *map(str, arguments)]
        variables = {**os.environ, **(environment or {})}
        try:
            done = subprocess.run(
                command, cwd=cwd, input=stdin, env=variables, timeout=seconds, capture_output=True
            )
        except subprocess.TimeoutExpired as late:
            return Ran(None, (late.stdout or b"").decode(), (late.stderr or b"").decode())
        return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())
