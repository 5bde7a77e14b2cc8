"""The values of each section of the page: comparison, headline numbers, metrics, curves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_kosmosg.pages import data_uri
from megatron_kosmosg.toy.report.charts import stage_chart
from megatron_kosmosg.toy.report.history import History
from megatron_kosmosg.toy.report.report_inputs import ReportInputs

_STAGE_TITLES = {
    "pretrain": "1. pretrain: reading text and images",
    "align": "2. align: the image decoder's language",
    "instruct": "3. instruct: drawing what the images show",
}
NUMERIC = ("value", "threshold", "chance", "ceiling", "n", "seed")
"""Columns of the metrics table."""


def conclusion(inputs: ReportInputs) -> tuple[str, str]:
    """The banner's kind and text: thresholds met, missed, or not asserted."""
    asserted = [row for row in inputs.rows if row["passed"] is not None]
    missed = [f"{row['group']}: {row['name']}" for row in asserted if not row["passed"]]
    if inputs.mode == "fast":
        return "warn", (
            "Fast run. A few iterations per stage show that every step works; the images are "
            "not meant to be good and thresholds do not count. Without --fast the same command "
            "trains properly."
        )
    if not asserted:
        return "warn", "No threshold was evaluated; see the log of the evaluation."
    if missed:
        names = "; ".join(missed)
        return "bad", f"{len(missed)} of {len(asserted)} thresholds are missed: {names}."
    return "good", f"All {len(asserted)} thresholds are met."


def tiles(inputs: ReportInputs) -> list[tuple[str, str]]:
    """The few numbers that a visitor looks for first, each with what it is."""
    cells = []
    asserted = [row for row in inputs.rows if row["passed"] is not None]
    if asserted and inputs.mode != "fast":
        met = sum(row["passed"] for row in asserted)
        cells.append((f"{met} of {len(asserted)}", "quality thresholds met"))
    training = [step for step in inputs.steps if step["name"] in _STAGE_TITLES]
    if training:
        wall = sum(step["seconds"] for step in training)
        busy = sum(step["cpu_seconds"] for step in training)
        cells.append((duration(wall), f"training of the three stages ({duration(busy)} CPU)"))
    updates = [inputs.histories[s].last_iteration for s in _STAGE_TITLES if s in inputs.histories]
    if updates:
        cells.append((" + ".join(map(str, updates)), "updates in pretrain, align, instruct"))
    if inputs.machine:
        cores = inputs.machine["cores"]
        cells.append(("2 ranks", f"on {cores} core(s): {inputs.machine['processor']}"))
    return cells


def grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The metrics by their groups, in the order in which those occur first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return groups


@dataclass(frozen=True)
class TrainingChart:
    """Curves of one training, with its speed in words."""

    title: str
    uri: str
    speed: str


def charts(inputs: ReportInputs) -> list[TrainingChart]:
    """One chart for each training."""
    made = []
    for name, history in inputs.histories.items():
        title = _STAGE_TITLES.get(name, name.replace("ablations/", "ablation: "))
        uri = data_uri(stage_chart(history).encode(), "image/svg+xml")
        made.append(TrainingChart(title, uri, _speed(history)))
    return made


@dataclass(frozen=True)
class Track:
    """Where a value (bar) and its threshold (tick) lie between chance and ceiling, in per cent."""

    kind: str
    value: float
    threshold: float | None


def track(row: dict[str, Any]) -> Track | None:
    """The track of a row of metrics; None where there is nothing to compare with."""
    chance, ceiling, value = row["chance"], row["ceiling"], row["value"]
    if None in (chance, ceiling, value) or chance == ceiling or not math.isfinite(value):
        return None

    def place(number: float) -> float:
        return 100 * min(max((number - chance) / (ceiling - chance), 0.0), 1.0)

    kind = {True: "yes", False: "no", None: "open"}[row["passed"]]
    threshold = row["threshold"]
    return Track(kind, place(value), None if threshold is None else place(threshold))


def duration(seconds: float) -> str:
    """Seconds in words: `8.4 s`, `3 min 20 s` or `1 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def number(value: float | int | None) -> str:
    """A number as the metrics table shows it."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _speed(history: History) -> str:
    words = [f"{history.last_iteration} updates"]
    for name, unit, scale in (
        ("samples_per_sec", "samples/s", 1.0),
        ("tokens_per_sec", "tokens/s", 1.0),
        ("tflops", "GFLOP/s", 1000.0),
    ):
        value = history.median(name)
        if value is not None:
            words.append(f"{value * scale:.4g} {unit}")
    return f"{words[0]}; median {', '.join(words[1:])}." if words[1:] else f"{words[0]}."
