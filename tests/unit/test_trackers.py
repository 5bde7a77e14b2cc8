"""Trackers: what TensorBoard and Weights & Biases (offline) hold of a run."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_kosmosg import train
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.monitoring import trackers
from megatron_kosmosg.training.metrics import MetricsWriter
from megatron_kosmosg.training.stage import Probe

GRID = Image.new("RGB", (8, 8), "blue")
WORDS = ("a  dog\non *grass*", "")


def config_in(folder: Path, *more: str) -> RunConfig:
    return load_config(None, ["stage=align", f"logging.output_dir={folder}", *more])


def tell(config: RunConfig, iterations: range) -> None:
    """A run of these iterations, with an evaluation after the last."""
    writer = MetricsWriter(config, iterations.start - 1, enabled=True)
    for iteration in iterations:
        writer.iteration({"iteration": iteration, "loss": iteration / 7, "grad_norm": None})
    found = Probe({"loss": 0.25}, {"grid": GRID}, {"grid": WORDS})
    writer.evaluation(iterations.stop - 1, found)
    writer.close()


def test_tensorboard_has_numbers_images_their_words_and_one_chart_of_both_losses(tmp_path):
    tell(config_in(tmp_path), range(1, 5))
    tell(config_in(tmp_path), range(3, 7))  # from the checkpoint of iteration 2
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    values = {e.step: e.value for e in board.Scalars("train/loss")}
    assert values == pytest.approx({n: n / 7 for n in range(1, 7)})
    assert len(board.Scalars("train/loss")) == 6
    assert [e.step for e in board.Scalars("heldout/heldout_loss")] == [6]
    assert "train/grad_norm" not in board.Tags()["scalars"]
    assert [e.step for e in board.Images("grid")] == [6]
    words = board.Tensors("grid/words/text_summary")[-1]
    assert words.step == 6 and words.tensor_proto.string_val[0] == b"    1 a dog on *grass*\n    2 "
    assert "custom_scalars__config__" in board.Tags()["tensors"]


def test_a_package_that_is_not_there_is_named_before_a_run_begins(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else find(name))
    code = train.main(
        ["stage=align", f"logging.output_dir={tmp_path / 'run'}", "logging.wandb=mine"]
    )
    assert code == 2 and not (tmp_path / "run").exists()
    assert "pip install 'megatron-kosmosg[wandb]'" in capsys.readouterr().err


def wait_for(file: Path, words: list[bytes]) -> None:
    """Returns when all of it is there: W&B's own process writes on when a run is finished."""
    deadline = time.monotonic() + 30
    while missing := [word for word in words if word not in file.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.05)


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None and not os.environ.get("KOSMOSG_REQUIRE_WANDB"),
    reason="no wandb (tests/optional_packages.sh brings it, and fails without it)",
)
def test_weights_and_biases_offline_goes_on_with_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    folder.mkdir()
    config = config_in(folder, "logging.wandb=mine", "logging.tensorboard=false")
    for iterations in (range(1, 3), range(3, 5)):
        tell(config, iterations)
        (file,) = (folder / "wandb" / "latest-run").resolve().glob("*.wandb")
        told = [b"mine", b"optimizer.lr", b"train/loss", b"1 a dog on *grass*"]
        told += [repr(n / 7).encode() for n in iterations]
        wait_for(file, told)
    run_id = (folder / "wandb" / "run_id").read_text().strip()
    runs = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in runs} == {f"run-{run_id}.wandb"}
    assert list((folder / "wandb").rglob("media/images/*.png"))
