"""The files of a quickstart's folder that its report is made of."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

ROW = {
    "group": "instruct",
    "name": "hue <median>",
    "value": 6.25,
    "unit": "deg",
    "threshold": 9.0,
    "direction": "<=",
    "n": 64,
    "seed": 0,
    "chance": 90.0,
    "ceiling": 0.6,
    "passed": True,
}


def write_metrics(folder: Path, count: int = 30) -> None:
    folder.mkdir(parents=True)
    lines = []
    for i in range(1, count + 1):
        record = {"iteration": i, "loss": 3.0 / i, "lr": 1e-3, "grad_norm": 1.0}
        record |= {"samples_per_sec": 40.0, "tokens_per_sec": 900.0, "tflops": 0.01, "cosine": 0.5}
        if i % 10 == 0:
            record |= {"heldout_loss": 4.0 / i, "heldout_accuracy": 0.5}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def write_run(out: Path, rows: list[dict], mode: str = "full") -> None:
    for stage in ("pretrain", "align", "instruct"):
        write_metrics(out / stage)
    evaluation = out / "evaluation"
    evaluation.mkdir()
    (evaluation / "metrics.json").write_text(json.dumps({"rows": rows}))
    Image.new("RGB", (8, 8), "red").save(evaluation / "sheet.png")
    image = {"file": "sheet.png", "title": "One subject", "caption": "shown & drawn"}
    image |= {"columns": ["prompt", "result"], "rows": ["a <image> on red"]}
    (evaluation / "images.json").write_text(json.dumps([image]))
    step = {"name": "pretrain", "title": "pretrain", "command": "python -m x 'a b'"}
    step |= {"seconds": 75.0, "cpu_seconds": 140.0}
    machine = {"processor": "cpu", "cores": 2, "system": "Linux", "python": "3.11"}
    record = {"mode": mode, "machine": machine, "steps": [step]}
    (out / "quickstart.json").write_text(json.dumps(record))
