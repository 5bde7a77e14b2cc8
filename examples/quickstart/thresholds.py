"""The evaluation's table for a terminal, and whether all thresholds are met."""

from __future__ import annotations

import json
from pathlib import Path

_MARKS = {True: "yes", False: "MISSED", None: "-"}


def read_rows(metrics: Path) -> list[dict]:
    """Rows of the evaluation's metrics.json."""
    return json.loads(metrics.read_text(encoding="utf-8"))["rows"]


def table(rows: list[dict]) -> str:
    """Rows by group, groups in the order of their first row; columns aligned."""
    header = ("", "value", "threshold", "chance", "ceiling", "n", "seed", "met")
    lines: list[tuple[str, ...] | str] = [header]
    group = None
    order = list(dict.fromkeys(row["group"] for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row["group"])):
        if row["group"] != group:
            group = row["group"]
            lines.append(group)
        threshold = (
            "-" if row["threshold"] is None else f"{row['direction']} {_number(row, 'threshold')}"
        )
        cells = [_number(row, key) for key in ("chance", "ceiling")]
        count = [str(row[key]) if row[key] is not None else "-" for key in ("n", "seed")]
        name = f"  {row['name']}"
        value = f"{_number(row, 'value')} {row['unit'] or ''}".rstrip()
        lines.append((name, value, threshold, *cells, *count, _MARKS[row["passed"]]))
    tuples = [line for line in lines if isinstance(line, tuple)]
    widths = [max(len(line[i]) for line in tuples) for i in range(len(header))]
    return "\n".join(
        line
        if isinstance(line, str)
        else line[0].ljust(widths[0])
        + "".join(
            "  " + cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
        )
        for line in lines
    )


def missed(rows: list[dict]) -> list[str]:
    """Names of the rows whose threshold is missed."""
    return [f"{row['group']}: {row['name']}" for row in rows if row["passed"] is False]


def _number(row: dict, key: str) -> str:
    return "-" if row[key] is None else f"{row[key]:.4g}"
