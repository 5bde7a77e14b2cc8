"""Checkpoints of trained weights alone: resumed as whole ones are, read by everything, small; and
what happens where the base that has the other weights is moved, changed or in the way."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_kosmosg.checkpoint.base_checkpoint import weight_folders
from megatron_kosmosg.checkpoint.base_record import read_base
from megatron_kosmosg.checkpoint.folder import find_checkpoint
from megatron_kosmosg.cli.convert_checkpoint import main as convert
from megatron_kosmosg.config.errors import ConfigError, ConversionError
from megatron_kosmosg.config.schema import LoraConfig, RunConfig
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.verify import verify
from megatron_kosmosg.models.lora import ADAPTERS
from tests.support.conversion_models import conversion_config, write_random
from tests.support.ranks import run_ranks
from tests.support.run_case import records, run_loaded
from tests.support.shares import whole
from tests.support.tiny_models import replace_section, write_stable_diffusion

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2, "pipeline_layout": "decoder*2|decoder*1,M"}
DP2 = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = (TP2, PP2, DP2)
"""Two updates each, one after the other."""
WHOLE = {"weights": "all"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Stable Diffusion, and `align/`, float32 weights that a run starts from."""
    folder = tmp_path_factory.mktemp("models")
    write_stable_diffusion(folder / "stable-diffusion")
    write_random(folder / "align", conversion_config("align", folder))
    return folder


def config_of(models: Path, folder: Path, until: int, parallel: dict, **checkpoint) -> RunConfig:
    config = replace_section(conversion_config("instruct", models), "parallel", **parallel)
    config = dataclasses.replace(config, lora=LoraConfig(rank=3, trains=["aligner_m", "resampler"]))
    training = {"train_iters": until, "precision": "bf16", "eval_iters": 1}
    config = replace_section(config, "training", **training)
    rates = {"lr": 1e-2, "lr_warmup_iters": 1, "lr_decay_iters": 99, "lr_decay_style": "constant"}
    config = replace_section(config, "optimizer", **rates, ema_decay=0.4)
    checkpoint = {"load": str(models / "align"), "save_interval": 1, "keep_last": 1} | checkpoint
    config = replace_section(config, "checkpoint", **checkpoint)
    return replace_section(config, "logging", output_dir=str(folder), tensorboard=False)


def train(models: Path, folder: Path, until: int, parallel: dict, ranks: int = 2, **checkpoint):
    """(losses of all iterations so far, parameters after)."""
    config = config_of(models, folder, until, parallel, **checkpoint)
    ran = run_ranks(ranks, run_loaded, config)
    losses = [line["loss"] for line in records(config) if "loss" in line]
    return losses, whole([rank.after for rank in ran], tolerance=1e-2)


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> dict[str, tuple]:
    """{which weights were saved: (folder, losses, parameters at the end)}"""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, checkpoint in (("all", WHOLE), ("trained", {})):
        for number, parallel in enumerate(LAYOUTS):
            ended = train(models, folder / name, 2 * number + 2, parallel, **checkpoint)
        found[name] = folder / name, *ended
    return found


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in find_checkpoint(folder).iterdir())


def same(one: CheckpointTensors, other: CheckpointTensors) -> bool:
    names = one.names()
    return names == other.names() and all(
        torch.equal(one.read(name), other.read(name)) for name in names
    )


def test_every_layout_goes_on_as_from_whole_checkpoints(runs):
    (_, expected_losses, expected), (_, losses, after) = runs["all"], runs["trained"]
    assert len(losses) == 2 * len(LAYOUTS) and losses == expected_losses
    assert after.keys() == expected.keys()
    assert all(np.array_equal(after[name], value) for name, value in expected.items())


def test_what_trains_is_stored_and_nothing_else(runs):
    whole_run, trained = runs["all"][0], runs["trained"][0]
    assert read_base(find_checkpoint(whole_run)) is None
    stored = CheckpointTensors(trained, with_base=False).apart().names()
    trains = ("aligner_m.", "resampler.")
    assert all(name.endswith(ADAPTERS) or name.startswith(trains) for name in stored)
    every = CheckpointTensors(whole_run).apart().names()
    left_out = [every[name] for name in every.keys() - stored.keys()]
    assert len(left_out) > 50
    num_bytes = sum(np.prod(info.shape) * info.dtype.itemsize for info in left_out)
    assert on_disk(whole_run) - on_disk(trained) > 0.9 * num_bytes


@pytest.mark.parametrize("ema", [False, True])
def test_readers_find_what_a_whole_checkpoint_has(ema, runs):
    one, other = (CheckpointTensors(runs[name][0], ema=ema) for name in ("all", "trained"))
    assert same(one, other) and same(one.apart(), other.apart())


def test_exports_and_comparisons_take_it(runs, models, tmp_path):
    run, sd = runs["trained"][0], models / "stable-diffusion"
    given = ("--input", str(run), "--stable-diffusion", str(sd), "--output")
    assert convert(["export-hf", *given, str(tmp_path / "out")]) == 0
    assert all(each.relative <= 1e-2 for each in verify(run, tmp_path / "out"))


def forget(run: Path) -> None:
    """Removes what the run holds of its base, as if no link could have been made."""
    shutil.rmtree(run / "checkpoints" / "base")


@pytest.fixture(scope="module")
def moved(models, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A run of one update, where its base was and where that is now."""
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(models / "align", folder / "here" / "align")
    train(models, folder / "run", 1, {}, 1, load=str(folder / "here" / "align"))
    (folder / "here").rename(folder / "there")
    forget(folder / "run")
    return folder / "run", folder / "here" / "align", folder / "there" / "align"


def test_a_moved_base_is_asked_for_and_taken_from_load_or_beside(moved, models, tmp_path):
    run, was, now = moved
    with pytest.raises(ConversionError, match=rf"{was}/iter_0000000 .*, which is not there\."):
        CheckpointTensors(run)
    given = ("--input", str(run), "--output", str(tmp_path / "out"))
    assert convert(["export-mllm", *given]) == 2
    assert convert(["export-lora", *given]) == 2  # the resampler was trained, too
    with pytest.raises(ConfigError, match=rf"back, or link it as {run}/checkpoints/base"):
        weight_folders(find_checkpoint(run))
    beside = run / "checkpoints" / "base"
    beside.symlink_to(now)
    assert convert(["export-mllm", *given]) == 0
    beside.unlink()

    other = tmp_path / "here" / "align"
    write_random(other, conversion_config("align", models), seed=1)
    with pytest.raises(ConfigError, match="which is not there"):
        weight_folders(find_checkpoint(run), str(other))
    train(models, run, 2, {}, 1, load=str(now))
    assert read_base(find_checkpoint(run)).path == str(now / "iter_0000000")
    assert CheckpointTensors(run).names()

    forget(run)
    shutil.rmtree(now)
    write_random(now, conversion_config("align", models), seed=1)
    with pytest.raises(ConfigError, match=r"which is another one now \([0-9a-f]{16}\)"):
        weight_folders(find_checkpoint(run), str(now))
    shutil.rmtree(now)
    with pytest.raises(RuntimeError, match=r"ConfigError.*which is not there"):
        train(models, run, 3, {}, 1, load=str(now))


def test_a_checkpoint_of_the_run_itself_is_a_base_and_stays(runs, models, tmp_path):
    """Of a run that saved all weights before; and a run of adapters starts from another one."""
    shutil.copytree(runs["all"][0], tmp_path / "run")
    train(models, tmp_path / "run", 8, {}, 1)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("iter_*"))
    assert kept == ["iter_0000006", "iter_0000008"]
    assert read_base(find_checkpoint(tmp_path / "run")).path.endswith("iter_0000006")

    again = {"load": str(tmp_path / "run"), "load_stage": "instruct"}
    train(models, tmp_path / "again", 1, {}, 1, **again)
    last, before = CheckpointTensors(tmp_path / "again"), CheckpointTensors(tmp_path / "run")
    assert read_base(last.path).path == str(before.path)
    name = "embedding.word_embeddings.weight"
    value = before.read(name)
    assert torch.equal(last.read(name), value)

    # Its base and that one's are held, whatever becomes of the other run.
    (tmp_path / "run").rename(tmp_path / "away")
    assert torch.equal(CheckpointTensors(tmp_path / "again").read(name), value)
    (tmp_path / "away").rename(tmp_path / "run")

    train(models, tmp_path / "again", 2, {}, 1, **again, weights="all")
    alone = CheckpointTensors(tmp_path / "again")
    assert read_base(alone.path) is None and torch.equal(alone.read(name), value)


def test_a_base_is_held_although_its_own_run_deletes_it(models, tmp_path):
    run, origin = tmp_path / "run", tmp_path / "align"
    shutil.copytree(models / "align", origin)
    train(models, run, 1, {}, 1, load=str(origin))
    of_origin, last = CheckpointTensors(origin), CheckpointTensors(run)
    assert shared_files(run, of_origin.path) > 1
    name = "embedding.word_embeddings.weight"
    value, named = last.read(name), read_base(last.path)

    shutil.rmtree(origin)
    assert torch.equal(CheckpointTensors(run).read(name), value)
    write_random(origin, conversion_config("align", models), seed=1)  # another one in its place
    train(models, run, 2, {}, 1, load=str(origin))
    held = read_base(find_checkpoint(run))
    assert held == dataclasses.replace(named, path=held.path)
    assert Path(held.path).is_relative_to(run / "checkpoints" / "base")
    assert torch.equal(CheckpointTensors(run).read(name), value)
    run.rename(tmp_path / "moved")
    assert torch.equal(CheckpointTensors(tmp_path / "moved").read(name), value)


def shared_files(run: Path, base: Path) -> int:
    """How many files of the base the run's folder has links to."""
    (held,) = (run / "checkpoints" / "base").iterdir()
    assert {path.name for path in held.iterdir()} == {path.name for path in base.iterdir()}
    return sum(path.samefile(base / path.name) for path in held.iterdir())


def test_a_base_on_another_file_system_is_not_held_and_the_run_goes_on(models, tmp_path, capfd):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if os.stat(elsewhere).st_dev == tmp_path.stat().st_dev:
            pytest.skip("temporary files are in memory here: there is no other file system")
        shutil.copytree(models / "align", Path(elsewhere, "align"))
        config = config_of(models, tmp_path, 2, {}, load=f"{elsewhere}/align")
        run_ranks(1, run_loaded, config, start_method="spawn")  # one that writes where pytest reads
        assert CheckpointTensors(tmp_path).names()
        assert not (tmp_path / "checkpoints" / "base").exists()
    assert capfd.readouterr().err.count("which must stay") == 1
