"""metrics.jsonl: one line an iteration, cut back on resume, never a NaN."""

from __future__ import annotations

import json
import time

from PIL import Image

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.training.metrics import MetricsWriter, cut_back
from megatron_kosmosg.training.stage import Probe


def config_in(folder):
    return load_config(
        None, ["stage=align", f"logging.output_dir={folder}", "logging.tensorboard=true"]
    )


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_no_line_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"iteration": n, "loss": n / 2} for n in (1, 2, 2, 3, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 5, "lo')
    cut_back(path, 2)
    assert read(tmp_path) == rows[:3]
    cut_back(path, 0)
    assert read(tmp_path) == []


def test_evaluations_get_their_own_line_and_images_go_to_tensorboard(tmp_path):
    writer = MetricsWriter(config_in(tmp_path), 0, enabled=True)
    writer.iteration({"iteration": 1, "loss": 0.5})
    grid = Image.new("RGB", (8, 8), "blue")
    writer.evaluation(1, Probe({"loss": float("nan"), "heldout_hue": 3.0}, {"grid": grid}))
    writer.evaluation(1, Probe())
    writer.flush()
    writer.close()
    written = read(tmp_path)
    for line in written:
        assert abs(line.pop("time") - time.time()) < 60 and 0 <= line.pop("wall_time") < 60
    assert written == [
        {"iteration": 1, "loss": 0.5},
        {"iteration": 1, "heldout_loss": None, "heldout_hue": 3.0},
    ]
    events = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert b"grid" in events and b"train/loss" in events and b"heldout/heldout_hue" in events


def test_a_silent_writer_touches_nothing(tmp_path):
    writer = MetricsWriter(config_in(tmp_path), 0, enabled=False)
    writer.iteration({"iteration": 1})
    writer.evaluation(1, Probe({"loss": 1.0}))
    writer.close()
    assert list(tmp_path.iterdir()) == []
