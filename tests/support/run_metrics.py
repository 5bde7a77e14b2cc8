"""What a run wrote to metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_lines(folder: Path) -> list[dict]:
    return [line for line in lines(folder) if "lr" in line]


def curve(folder: Path) -> list[float]:
    return [line["loss"] for line in train_lines(folder)]


def norms(folder: Path) -> list[float]:
    return [line["grad_norm"] for line in train_lines(folder)]
