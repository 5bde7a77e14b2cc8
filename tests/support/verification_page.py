"""docs/verification.md from docs/verification.yaml: what each workflow showed, on which hardware.

Rows whose evidence is CI have their times from docs/verification_ci.json, which holds the last
figures of each step of `.ci/run FIGURES.json`.

usage, in the repository:
    python -m tests.support.verification_page [--write | --update FIGURES.json]
--update takes the figures of a CI run that passed into that file, and writes the page.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
CARDS = REPOSITORY / "docs" / "verification.yaml"
CI_FIGURES = REPOSITORY / "docs" / "verification_ci.json"
PAGE = REPOSITORY / "docs" / "verification.md"
STATUSES = ("verified", "rehearsed", "planned", "not run", "unsupported")
MEASURED = ("time", "memory", "date", "commit")
HEAD = """\
# What has been verified, and on what

Written by `python -m tests.support.verification_page --write` from
[verification.yaml](verification.yaml). Five words, and no others:

- **verified**: a command of this repository showed it, on that hardware, at that commit. "every
  commit" is CI, on CPUs; a time beside it is that of the commit and machine that the row names.
- **rehearsed**: it ran on devices or nodes that are pretended ([rehearsal.md](rehearsal.md)).
- **planned**: `kosmosg plan` says so; its figures are not repeated here.
- **not run**: nobody has run it there.
- **unsupported**: it is refused with a message.

Figures of GPUs with their notes: [gpu_results.md](gpu_results.md); of the toy world:
[results.md](results.md).
"""


def cards() -> dict[str, Any]:
    """`hardware`: {key: words}; `rows`: a list of what the columns of the page say."""
    return yaml.safe_load(CARDS.read_text(encoding="utf-8"))


def ci_figures() -> dict[str, dict[str, Any]]:
    """What `.ci/run` noted of each of its steps when it was last taken, by the step's command."""
    return {step["command"]: step for step in json.loads(CI_FIGURES.read_text(encoding="utf-8"))}


def ci_commands() -> set[str]:
    """Of the rows whose evidence is CI."""
    rows = cards()["rows"]
    return {row["command"] for row in rows if "ci" in row.get("evidence", {})}


def update(path: Path) -> None:
    """Takes the figures of `.ci/run path` into CI_FIGURES. Raises ValueError, and changes nothing,
    for steps that failed or have no row, and for a commit that others do not have."""
    steps = json.loads(path.read_text(encoding="utf-8"))
    for step in steps:
        if not step["passed"]:
            raise ValueError(f"{path}: {step['command']} failed; only what passed is shown")
        if step["command"] not in ci_commands():
            raise ValueError(f"{path}: no row of {CARDS.name} has {step['command']} and ci")
        if not re.fullmatch(r"[0-9a-f]{7,40}", step["commit"]):
            raise ValueError(
                f"{path}: the commit is {step['commit'] or 'not known'}; run it on a clean checkout"
            )
    known = ci_figures() | {step["command"]: step for step in steps}
    kept = [json.dumps(known[command]) for command in sorted(known)]
    CI_FIGURES.write_text("[\n" + ",\n".join(kept) + "\n]\n", encoding="utf-8")


def page() -> str:
    """The page's text: a table for each kind of hardware."""
    described, figures = cards(), ci_figures()
    parts = [HEAD]
    for key, words in described["hardware"].items():
        parts += [
            f"\n## {words}\n",
            "| workflow | status | command | result | time | memory | when |",
        ]
        parts.append("|---" * 7 + "|")
        parts += [_line(row, figures) for row in described["rows"] if row["hardware"] == key]
    return "\n".join(parts) + "\n"


def _line(row: dict[str, Any], figures: dict[str, dict[str, Any]]) -> str:
    evidence = row.get("evidence", {})
    time = row.get("time", "")
    if "commit" in row:
        when = f"{row['date']}, {row['commit']}"
    else:
        when = "every commit" if evidence else ""
    if "ci" in evidence and row["command"] in figures:
        step = figures[row["command"]]
        time = f"{_duration(step['seconds'])} ({step['machine']})"
        when = f"every commit; time: {step['date']}, {step['commit']}"
    cells = (
        row["workflow"],
        f"**{row['status']}**",
        f"`{row['command']}`",
        row["result"],
        time,
        row.get("memory", ""),
        when,
    )
    return f"| {' | '.join(cells)} |"


def _duration(seconds: int) -> str:
    return f"{seconds} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def main(arguments: list[str]) -> int:
    """0, or 1 with a message where the page is not of today or figures cannot be taken."""
    if arguments[:1] == ["--update"] and len(arguments) == 2:
        try:
            update(Path(arguments[1]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    elif arguments not in ([], ["--write"]):
        print(__doc__.split("usage", 1)[1], file=sys.stderr)
        return 1
    if arguments:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE} is not what {CARDS.name} says; add --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
