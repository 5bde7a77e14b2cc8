"""What the page is made of, read from a quickstart's output folder; parts may be missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kosmosg.foreign_files import read_file, read_json
from megatron_kosmosg.pages import data_uri
from megatron_kosmosg.toy.report.history import History, read_history

_PNG = b"\x89PNG\r\n\x1a\n"
_NUMBER, _NUMBER_OR_NONE = (int, float), (int, float, type(None))
_MACHINE = {"system": (str,), "processor": (str,), "cores": (int, str), "python": (str,)}
_STEP = {
    "name": (str,),
    "title": (str,),
    "command": (str,),
    "seconds": _NUMBER,
    "cpu_seconds": _NUMBER,
}
_GRID = {
    "file": (str,),
    "title": (str,),
    "caption": (str,),
    "columns": (list, type(None)),
    "rows": (list, type(None)),
}
_ROW = {
    "group": (str,),
    "name": (str,),
    "unit": (str, type(None)),
    "direction": (str, type(None)),
    "passed": (bool, type(None)),
    **dict.fromkeys(("value", "threshold", "chance", "ceiling", "n", "seed"), _NUMBER_OR_NONE),
}
"""Fields of what is read, and the types they have."""
STAGES = ("pretrain", "align", "instruct")
METRICS_FILE, RECORD_FILE = "metrics.jsonl", "quickstart.json"


@dataclass(frozen=True)
class Figure:
    """One grid of images. columns, rows: labels of equally large cells, may be empty."""

    path: Path
    title: str
    caption: str
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()

    def uri(self) -> str:
        """The image itself, for the page. Raises ValueError for any other file."""
        try:
            content = read_file(self.path)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be put on the page: {error}") from error
        if not content.startswith(_PNG):
            raise ValueError(f"{self.path} is no PNG; nothing else is shown on the page")
        return data_uri(content, "image/png")


@dataclass(frozen=True)
class ReportInputs:
    mode: str
    """full | fast"""
    machine: dict[str, str | int]
    steps: list[dict]
    """name, title, command, seconds, cpu_seconds of every step that ran."""
    histories: dict[str, History]
    """By stage, or by `ablations/NAME`."""
    rows: list[dict]
    """The evaluation's metrics."""
    figures: list[Figure]
    files: list[Path]
    """What all this was read from, images included."""


def read_inputs(out: Path) -> ReportInputs:
    """Everything the page shows.

    Raises ValueError when `out` holds neither a training's metrics.jsonl nor an evaluation, and for
    files that hold something else than those that a quickstart writes.
    """
    record = _read_json(out / RECORD_FILE, {})
    machine, steps = record.get("machine", {}), record.get("steps", [])
    if machine:
        _check(machine, _MACHINE, out / RECORD_FILE)
    for step in steps:
        _check(step, _STEP, out / RECORD_FILE)
    runs = [out / stage for stage in STAGES] + sorted((out / "ablations").glob("*"))
    histories = {
        str(run.relative_to(out)): read_history(run / METRICS_FILE)
        for run in runs
        if (run / METRICS_FILE).is_file()
    }
    evaluation = out / "evaluation"
    rows = _read_json(evaluation / "metrics.json", {}).get("rows", [])
    for row in rows:
        _check(row, _ROW, evaluation / "metrics.json")
    rows = [{**dict.fromkeys(_ROW), **row} for row in rows]
    if not histories and not rows:
        raise ValueError(
            f"{out} holds no metrics.jsonl of a stage ({', '.join(STAGES)}) and no "
            "evaluation/metrics.json; give the folder that examples/quickstart.sh wrote with"
            " --output"
        )
    figures = [_figure(entry, evaluation) for entry in _read_json(evaluation / "images.json", [])]
    grid = out / "generated" / "contact_sheet.png"
    if grid.is_file():
        figures.append(
            Figure(
                path=_figure_path(grid, out),
                title="Drawn by the exported pipeline",
                caption="Held-out prompts, four starts each, with kosmosg generate from export/, "
                "the diffusers folder made of the last checkpoint.",
            )
        )
    return ReportInputs(
        mode=str(record.get("mode", "full")),
        machine=machine,
        steps=steps,
        histories=histories,
        rows=rows,
        figures=figures,
        files=[
            *(out / name / METRICS_FILE for name in histories),
            *(out / RECORD_FILE, evaluation / "metrics.json", evaluation / "images.json"),
            *(figure.path for figure in figures),
        ],
    )


def _figure(entry: dict[str, Any], evaluation: Path) -> Figure:
    listing = evaluation / "images.json"
    _check(entry, _GRID, listing)
    entry = {"columns": [], "rows": []} | entry
    if not all(isinstance(text, str) for text in [*entry["columns"], *entry["rows"]]):
        raise ValueError(f"{listing}: columns and rows are lists of texts")
    return Figure(
        path=_figure_path(evaluation / entry["file"], evaluation),
        title=entry["title"],
        caption=entry["caption"],
        columns=tuple(entry["columns"]),
        rows=tuple(entry["rows"]),
    )


def _figure_path(figure: Path, folder: Path) -> Path:
    """The image's path. Raises ValueError where it lies outside of the folder, also through a
    link: the page would carry along a file that its reader was not meant to have."""
    if not figure.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{figure} lies outside {folder}; it is not put on the page")
    return figure


def _check(entry: Any, fields: dict[str, tuple[type, ...]], path: Path) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{path} lists a {type(entry).__name__}, which no quickstart writes")
    for name, types in fields.items():
        value = entry.get(name)
        is_endless = isinstance(value, float) and not math.isfinite(value) and name != "value"
        if type(value) not in types or is_endless:
            raise ValueError(f"{path}: {name} is {str(value)[:40]!r}, which no quickstart writes")


def _read_json(path: Path, absent: Any) -> Any:
    """What the file holds, of the same kind as `absent`, which stands for a missing file."""
    if not path.is_file():
        return absent
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if type(found) is not type(absent):
        raise ValueError(f"{path} holds a {type(found).__name__}, which no quickstart writes")
    return found
