"""A row of the table, and the lines in which a worker hands rows over. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One figure, or why there is none."""

    section: str
    name: str
    state: Literal["measured", "not run", "failed"] = "measured"
    value: float | None = None
    unit: str = ""
    target: float | None = None
    """What the project is after, in the same unit, at full size."""
    reason: str = ""
    """Of a row that was not measured."""
    details: dict[str, float | int | str] = field(default_factory=dict)
    part: str = ""
    """Of the run, by the name that `--parts` takes."""

    def line(self) -> str:
        """As JSON in one line."""
        return json.dumps(asdict(self))


def not_run(section: str, name: str, reason: str) -> Row:
    """A row for what is missing on this machine."""
    return Row(section, name, "not run", reason=" ".join(reason.split())[:300])


def failed(section: str, name: str, error: BaseException | str) -> Row:
    """A row for what should have run."""
    message = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Row(section, name, "failed", reason=" ".join(message.split())[:600])


def row_of(line: str) -> Row:
    """The row of `Row.line`."""
    return Row(**json.loads(line))
