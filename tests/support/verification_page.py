"""docs/verification.md from docs/verification.yaml: what each workflow showed, on which hardware.

usage, in the repository:
    python -m tests.support.verification_page [--write]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
CARDS = REPOSITORY / "docs" / "verification.yaml"
PAGE = REPOSITORY / "docs" / "verification.md"
STATUSES = ("verified", "rehearsed", "planned", "not run", "unsupported")
MEASURED = ("time", "memory", "date", "commit")
HEAD = """\
# What has been verified, and on what

Written by `python -m tests.support.verification_page --write` from
[verification.yaml](verification.yaml). Four words, and no others:

- **verified**: a command of this repository showed it, on that hardware, at that commit. "every
  commit" is CI, on CPUs.
- **rehearsed**: it ran on devices or nodes that are pretended ([rehearsal.md](rehearsal.md)).
- **planned**: `kosmosg plan` says so; its figures are not repeated here.
- **not run**: nobody has run it there. *unsupported*: it is refused with a message.

Figures of GPUs with their notes: [gpu_results.md](gpu_results.md); of the toy world:
[results.md](results.md).
"""


def cards() -> dict[str, Any]:
    """`hardware`: {key: words}; `rows`: a list of what the columns of the page say."""
    return yaml.safe_load(CARDS.read_text(encoding="utf-8"))


def page() -> str:
    """The page's text: a table for each kind of hardware."""
    given = cards()
    parts = [HEAD]
    for key, words in given["hardware"].items():
        parts += [
            f"\n## {words}\n",
            "| workflow | status | command | result | time | memory | when |",
        ]
        parts.append("|---" * 7 + "|")
        parts += [_line(row) for row in given["rows"] if row["hardware"] == key]
    return "\n".join(parts) + "\n"


def _line(row: dict[str, Any]) -> str:
    if "commit" in row:
        when = f"{row['date']}, {row['commit']}"
    else:
        when = "every commit" if "evidence" in row else ""
    cells = (
        row["workflow"],
        f"**{row['status']}**",
        f"`{row['command']}`",
        row["result"],
        row.get("time", ""),
        row.get("memory", ""),
        when,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is not what {CARDS.name} says; add --write")
