"""What the page is made of, read from a quickstart's output folder; parts may be missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmosg.toy.report.history import History, read_history

STAGES = ("pretrain", "align", "instruct")
METRICS_FILE, RECORD_FILE = "metrics.jsonl", "quickstart.json"


@dataclass(frozen=True)
class Picture:
    """One sheet of pictures. columns, rows: labels of equally large cells, may be empty."""

    path: Path
    title: str
    caption: str
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


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
    pictures: list[Picture]
    files: list[Path]
    """What all this was read from, pictures included."""


def read_inputs(out: Path) -> ReportInputs:
    """Everything the page shows.

    Raises ValueError when `out` holds neither a training's metrics.jsonl nor an evaluation.
    """
    record = _read_json(out / RECORD_FILE, {})
    runs = [out / stage for stage in STAGES] + sorted((out / "ablations").glob("*"))
    histories = {
        str(run.relative_to(out)): read_history(run / METRICS_FILE)
        for run in runs
        if (run / METRICS_FILE).is_file()
    }
    evaluation = out / "evaluation"
    rows = _read_json(evaluation / "metrics.json", {}).get("rows", [])
    if not histories and not rows:
        raise ValueError(
            f"{out} holds no metrics.jsonl of a stage ({', '.join(STAGES)}) and no "
            "evaluation/metrics.json; give the folder that examples/quickstart.sh wrote with --out"
        )
    pictures = [
        Picture(
            path=evaluation / entry["file"],
            title=entry["title"],
            caption=entry["caption"],
            columns=tuple(entry.get("columns", ())),
            rows=tuple(entry.get("rows", ())),
        )
        for entry in _read_json(evaluation / "images.json", [])
    ]
    sheet = out / "generated" / "contact_sheet.png"
    if sheet.is_file():
        pictures.append(
            Picture(
                path=sheet,
                title="Drawn by the exported pipeline",
                caption="Held-out prompts, four starts each, with kosmosg generate from export/, "
                "the diffusers folder made of the last checkpoint.",
            )
        )
    return ReportInputs(
        mode=record.get("mode", "full"),
        machine=record.get("machine", {}),
        steps=record.get("steps", []),
        histories=histories,
        rows=rows,
        pictures=pictures,
        files=[
            *(out / name / METRICS_FILE for name in histories),
            *(out / RECORD_FILE, evaluation / "metrics.json", evaluation / "images.json"),
            *(picture.path for picture in pictures),
        ],
    )


def _read_json(path: Path, absent):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else absent
