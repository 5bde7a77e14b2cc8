"""The GPUs of a plan, those of one's own, and what is left free on them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml

from megatron_kosmosg import train
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.planning.gpus import GPUS, Efficiency, gpu_named, recognised_gpu
from megatron_kosmosg.planning.memory import GIB, RankKind, RankMemory, memory_table
from megatron_kosmosg.planning.run_plan import plan_the_run
from megatron_kosmosg.training.against_plan import AgainstPlan, PlannedRun

KEY = "logging.planned_gpu"
OWN = {
    "memory_gib": 31.4, "bf16_tflops": 209, "fp16_tflops": 209, "fp32_tflops": 104.8,
    "memory_gb_s": 1792, "link_gb_s": 64, "network_gb_s": 1.56, "capability": [12, 0],
}  # fmt: skip


def write(path, **changes):
    kept = {key: value for key, value in (OWN | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(kept))
    return str(path)


@pytest.mark.parametrize("name", ["rtx4090-24", "l40s-48", "a100-40", "a6000-48", "b200-180"])
def test_every_gpu_says_where_its_figures_are_from(name):
    assert GPUS[name].source
    assert all(gpu.source for gpu in GPUS.values())


def test_a_file_gives_a_gpu_of_ones_own(tmp_path):
    gpu = gpu_named(write(tmp_path / "rtx5090.yaml", per_node=4, source="its data sheet"))
    assert gpu.name == "rtx5090" and gpu.capability == (12, 0) and gpu.per_node == 4
    assert gpu.peak_flops("bf16") == 209e12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory_gib": None}, "memory_gib is missing"),
        ({"memory": 32}, "memory is unknown"),
        ({"link_gb_s": "fast"}, "link_gb_s='fast' has to be a number"),
        ({"memory_gb_s": -1}, "memory_gb_s=-1 has to be a number"),
        ({"fp16_tflops": float("inf")}, "fp16_tflops=inf has to be a number"),
        ({"capability": 12}, "capability=12 has to be two whole numbers"),
        ({"per_node": 1.5}, "per_node=1.5 has to be a whole number"),
        ({"per_node": True}, "per_node=True has to be a whole number"),
        ({"source": 3}, "source=3 has to be a text"),
    ],
)
def test_a_file_that_is_wrong_is_told_how(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        gpu_named(write(tmp_path / "own.yaml", **changes))


def test_neither_a_name_nor_a_file(tmp_path):
    with pytest.raises(ConfigError, match="'h100' is none of .*h100-80.* a YAML file with memory"):
        gpu_named("h100")
    with pytest.raises(ConfigError, match="nowhere.yaml: no such file"):
        gpu_named(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "text.yaml").write_text("- a list\n")
    with pytest.raises(ConfigError, match="text.yaml must hold a mapping"):
        gpu_named(str(tmp_path / "text.yaml"))


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090-24"),
        ("NVIDIA RTX A6000", 47.4, "a6000-48"),
        ("NVIDIA L40S", 44.4, "l40s-48"),
        ("NVIDIA B200", 178.4, "b200-180"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100-32"),
        ("Tesla V100-SXM2-16GB", 15.8, None),
        ("NVIDIA RTX 6000 Ada Generation", 47.4, None),
        ("NVIDIA GB200", 184.0, None),
    ],
)
def test_a_driver_s_name_is_recognised(device, gib, name):
    found = recognised_gpu(device, gib)
    assert (None if found is None else found.name) == name


def test_what_fits_only_if_the_plan_is_exact_is_called_too_tight():
    no = dict.fromkeys((field.name for field in dataclasses.fields(RankMemory)), 0.0)
    kinds = [
        RankKind(name, "", 1, None, RankMemory(**(no | {"activations": gib * GIB})))
        for name, gib in (("fits", 75.0), ("tight", 78.8), ("large", 80.0))
    ]
    lines = memory_table(kinds, 79.1, Efficiency().memory_error).splitlines()[1:]
    assert lines[0].endswith("fits")
    assert "TOO TIGHT" in lines[1] and "5%" in lines[1]
    assert lines[2].endswith("TOO LARGE")


def test_a_run_leaves_its_plan_where_its_gpu_is_known(tmp_path):
    card = write(tmp_path / "card.yaml")
    settings = [f"logging.output_dir={tmp_path / 'run'}"]
    assert plan_the_run(load_config("toy_pretrain", settings), 2) is None  # a CPU
    planned = plan_the_run(load_config("toy_pretrain", [*settings, f"{KEY}={card}"]), 2)
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert planned.gpu == found["gpu"] == "card" and found["num_gpus"] == 2
    assert planned.samples_per_second == pytest.approx(found["iteration"]["images_per_second"])
    assert planned.memory_gib == pytest.approx(found["ranks"]["decoder"]["memory_gib"]["total"])
    assert not torch.distributed.is_initialized()


def test_measured_against_planned_is_said_once_after_fifty_iterations():
    """The first ten, slow ones, do not count: 8 samples every 0.5 s."""
    comparison = AgainstPlan(PlannedRun("card", 20.0, 7.0), 8, torch.device("cpu"))
    lines = [comparison.after(9.0 if i < 10 else 0.5) for i in range(80)]
    assert [i for i, line in enumerate(lines) if line] == [49]
    assert lines[49] == ("measured against planned for card: 16.0 samples/s, planned 20.0 (0.80 x)")
    silent = AgainstPlan(None, 8, torch.device("cpu"))
    assert not any(silent.after(0.5) for _ in range(80))


def test_a_gpu_that_is_nowhere_ends_the_start_with_2(capsys, tmp_path):
    settings = [f"{KEY}=h100", f"logging.output_dir={tmp_path}"]
    assert train.main(["--config", "debug_pretrain", *settings]) == 2
    assert "'h100' is none of" in capsys.readouterr().err
