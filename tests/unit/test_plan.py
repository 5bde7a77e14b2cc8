"""tools/plan.py: shards, FLOPs, memory, schedule and search against independent figures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.config.schema import BlendEntry, DataConfig, TrainingConfig
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel.fake_world import pretend_rank
from megatron_kosmosg.planning.communication import tensor_traffic
from megatron_kosmosg.planning.estimate import estimate
from megatron_kosmosg.planning.gpus import GPUS, Efficiency
from megatron_kosmosg.planning.memory import RankMemory, decoder_memory, unet_bytes
from megatron_kosmosg.planning.model_counts import build_shards, model_shares, whole_model
from megatron_kosmosg.planning.pipeline_stage_cost import pipeline_stage_work, score_work
from megatron_kosmosg.planning.workload import MicroBatch, micro_batches
from tests.support.measured_memory import measured_bytes
from tests.support.ranks import run_ranks
from tests.support.tiny_models import (
    TARGET_SIZE,
    replace_section,
    tiny_config,
    write_stable_diffusion,
)

ROOT = Path(__file__).parents[2]
G = 1e9


def full_size(stage: str, *overrides: str):
    return load_config(ROOT / "examples" / "configs" / f"{stage}_256gpu.yaml", list(overrides))


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    return write_stable_diffusion(tmp_path_factory.mktemp("stable-diffusion"))


# Shards


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        (
            "pretrain",
            ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
        ),
        ("align", ["parallel.pipeline_model_parallel_size=2"]),
        ("instruct", ["parallel.pipeline_model_parallel_size=4", "score.placement=colocated"]),
        ("instruct", []),
    ],
)
def test_built_shards_of_256_ranks_hold_what_the_search_reckons_with(stage, overrides):
    config = full_size(stage, *overrides)
    world = rank_grid(config, 256)
    shares = model_shares(config, whole_model(config))
    shards = build_shards(config, world)
    decoders = [shard for shard in shards if shard.kind != "score"]
    for shard, count in zip(decoders, shares.counts, strict=True):
        assert (shard.trainable, shard.frozen) == (count.trainable, count.frozen)
        assert shard.rank in shard.groups["tensor"] and shard.rank in shard.groups["data"]
    assert not torch.distributed.is_initialized()
    if len(shards) > len(decoders):
        assert shards[-1].frozen == 859_520_964 + 83_653_863  # published U-Net and VAE
        assert shards[-1].parameter_bytes == 2 * shards[-1].frozen


def test_two_real_ranks_hold_the_built_shard_and_the_planned_memory(stable_diffusion, tmp_path):
    config = tiny_config(
        "instruct", stable_diffusion, tmp_path, tensor_model_parallel_size=2, sequence_parallel=True
    )
    config = with_batch(config, rows=6, length=60, precision="fp32")
    (shard,) = build_shards(config, rank_grid(config, 2))
    planned = planned_memory(config, rows=6, length=60, ranks=2)
    for rank in run_ranks(2, measured_bytes, config, 6, 60):
        assert (rank["trainable"], rank["frozen"]) == (shard.trainable, shard.frozen)
        assert planned.tensors == pytest.approx(rank["peak"], rel=0.15)


# FLOPs


def counted(function, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def test_work_of_every_module_is_what_its_real_forward_pass_counts():
    """Full size on the meta device, one row of 215 positions and two images."""
    config = full_size("align", "parallel.tensor_model_parallel_size=1")
    (spec,) = model_shares(config, whole_model(config)).specs
    batch = MicroBatch(images=1, rows=1, length=215, prompt_images=2)
    work = {w.module: w.forward for w in pipeline_stage_work(config, spec, True, batch)}

    def empty(*shape):
        return torch.empty(*shape, device="meta")

    pixels, features = empty(2, 3, 224, 224), empty(2, 257, 1024)
    hidden, padding = empty(215, 1, 2048), torch.zeros(1, 215, dtype=torch.bool, device="meta")
    with pretend_rank(rank_grid(config, 1), 0) as context:
        model = KosmosG(config, context, output_head=False, aligner_parts=("M", "N")).eval()
        found = {
            "vision": counted(model.vision_encoder, pixels),
            "resampler": counted(model.resampler, features),
            "decoder": counted(model.decoder, hidden, None),
            "aligner_M": counted(model.aligner_m, hidden.transpose(0, 1), padding),
            "aligner_N": counted(model.aligner_n, empty(1, 77, 768), 215),
        }
    for name, flops in found.items():
        assert work[name] == pytest.approx(flops, rel=0.02), name
    assert found["decoder"] / G == pytest.approx(528.5, rel=0.02)
    assert found["vision"] / G == pytest.approx(2 * 162.0, rel=0.02)


def test_a_sample_of_the_plan_costs_the_published_parts():
    config = full_size(
        "instruct", "parallel.tensor_model_parallel_size=1", "score.placement=colocated"
    )
    unet, vae = score_work(config, 1)
    assert unet.forward / G == pytest.approx(803, rel=0.02)
    assert unet.backward / G == pytest.approx(866, rel=0.02)
    assert vae.forward / G == pytest.approx(1117, rel=0.02)
    one_kind = dataclasses.replace(
        config,
        data=DataConfig(blend={"compositional": BlendEntry("x")}, latent_cache="x"),
        training=TrainingConfig(micro_batch_size=64, global_batch_size=64 * 256),
    )
    shares = model_shares(one_kind, whole_model(one_kind))
    planned = estimate(one_kind, rank_grid(one_kind, 256), GPUS["h100-80"], Efficiency(), shares)
    per_sample = planned.total_flops / (64 * 256)
    null_row = 3 * (528.5 + 61.1) * G / 64  # shared by the 64 samples of a micro-batch
    assert per_sample == pytest.approx((2.17 + 1.67) * 1e12 + null_row, rel=0.02)


# Memory


def with_batch(config, rows: int, length: int, precision: str, recompute: str = "none"):
    """Two micro-batches an update."""
    config = replace_section(
        config,
        "training",
        micro_batch_size=rows,
        global_batch_size=2 * rows,
        precision=precision,
        recompute=recompute,
    )
    return replace_section(config, "data", target_image_size=TARGET_SIZE, seq_length=length)


def planned_memory(config, rows: int, length: int, ranks: int) -> RankMemory:
    """Of the only kind of rank; as `random_batch`, with an image in all rows but the last."""
    shares = model_shares(config, whole_model(config))
    prompt_images = 0 if config.stage == "align" else rows - 1
    batch = MicroBatch(rows, rows + (config.stage == "instruct"), length, prompt_images)
    world, (spec,), (count,) = rank_grid(config, ranks), shares.specs, shares.counts
    return decoder_memory(config, world, spec, 0, count, [batch] * 2, Efficiency())


@pytest.mark.parametrize(
    ("stage", "precision", "recompute"),
    [
        ("instruct", "fp32", "none"),
        ("instruct", "bf16", "none"),
        ("instruct", "fp32", "full"),
        ("pretrain", "fp32", "none"),
        ("align", "fp32", "none"),
    ],
)
def test_memory_is_within_15_percent_of_the_measured_peak(
    stable_diffusion, tmp_path, stage, precision, recompute
):
    rows, length = 6, 60
    config = with_batch(
        tiny_config(stage, stable_diffusion, tmp_path), rows, length, precision, recompute
    )
    planned = planned_memory(config, rows, length, ranks=1)
    (found,) = run_ranks(1, measured_bytes, config, rows, length)
    print(planned, found)
    kept = planned.tensors - planned.activations - planned.score_activations
    assert kept == pytest.approx(found["kept"], rel=0.15)
    assert planned.tensors == pytest.approx(found["peak"], rel=0.15)


def test_the_unet_keeps_what_was_measured_at_full_size():
    saved, _ = unet_bytes(None, 512, 77)
    assert saved / 2**20 == pytest.approx(1405, rel=0.02)  # MiB, a float32 run with fused attention


# Batches and traffic


def test_micro_batches_are_as_long_as_their_longest_row():
    config = full_size("instruct", "training.micro_batch_size=8")
    assert [b.length for b in micro_batches(config, 1)] == [215]
    several = micro_batches(config, 10)
    assert [b.length for b in several] == [215] * 4 + [100] * 4 + [40] * 2
    assert [b.prompt_images for b in several] == [16] * 4 + [8] * 4 + [0] * 2
    assert all(b.rows == b.images + 1 for b in several)


def test_tensor_traffic_of_the_decoder():
    """Megatron's figure: four all-gathers or reduce-scatters a layer forward, six backward."""
    config = full_size("pretrain", "parallel.tensor_model_parallel_size=2")
    (spec,) = model_shares(config, whole_model(config)).specs
    batch = MicroBatch(images=1, rows=1, length=2048, prompt_images=0)
    forward, backward = tensor_traffic(config, spec, False, batch)
    tensor = 2048 * 2048 * 2
    sub_norms = 24 * 2 * 2 * 4 * 2048
    assert forward.sent == pytest.approx((24 * 4 + 1) * tensor / 2 + sub_norms, rel=1e-6)
    assert backward.sent == pytest.approx(24 * 6 * tensor / 2 + sub_norms, rel=1e-6)


# The tool


def tool():
    spec = importlib.util.spec_from_file_location("plan_tool", ROOT / "tools" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    return tool().main()


def test_the_shipped_instruct_plan_names_what_is_faster(monkeypatch, tmp_path, capsys):
    """Dedicated by default, colocated by override; the same figures from either side."""
    config = str(ROOT / "examples" / "configs" / "instruct_256gpu.yaml")
    shipped, other = tmp_path / "shipped.json", tmp_path / "other.json"
    arguments = ["--config", config, "--gpu", "a100-80", "model.diffusion.path=null"]
    assert run_tool(monkeypatch, *arguments, "--json", str(shipped)) == 0
    output = capsys.readouterr().out
    plan = json.loads(shipped.read_text())
    assert plan["num_gpus"] == 256
    assert plan["layout"]["placement"] == "dedicated"
    assert (plan["layout"]["tensor"], plan["layout"]["score_ranks_per_unit"]) == (1, 1)
    assert plan["layout"]["data"] == 128
    assert {name: kind["count"] for name, kind in plan["ranks"].items()} == {
        "decoder": 128,
        "score": 128,
    }
    assert "x this speed" in output and plan["iteration"]["score_idle"] > 0
    best = plan["faster"][0]
    assert best["times"] > 1.5 and "colocated" in best["layout"]
    assert "score.placement=colocated" in best["settings"]
    assert " ".join(best["settings"]) in output
    # Its settings are enough: their plan has the speed that was promised, and nothing to add.
    assert run_tool(monkeypatch, *arguments, *best["settings"], "--json", str(other)) == 0
    plan = json.loads(other.read_text())
    assert plan["layout"]["placement"] == "colocated" and plan["faster"] == []
    assert plan["iteration"]["images_per_second"] == pytest.approx(best["samples_per_second"])
    assert plan["iteration"]["score_idle"] is None


def test_search_plans_the_best_layout(monkeypatch, tmp_path, capsys):
    config = ROOT / "examples" / "configs" / "instruct_256gpu.yaml"
    found = tmp_path / "plan.json"
    arguments = ["--config", str(config), "--num-gpus", "16", "--gpu", "a100-80", "--search"]
    settings = ["training.global_batch_size=64", "model.diffusion.path=null"]
    assert run_tool(monkeypatch, *arguments, "--json", str(found), *settings) == 0
    output = capsys.readouterr().out
    plan = json.loads(found.read_text())
    listed = plan["search"]["candidates"]
    assert [c["seconds"] for c in listed] == sorted(c["seconds"] for c in listed)
    assert plan["iteration"]["seconds"] == pytest.approx(listed[0]["seconds"])
    assert plan["iteration"]["seconds"] == pytest.approx(
        sum(plan["iteration"]["parts_seconds"].values())
    )
    assert any(reason.startswith("score ranks") for reason in plan["search"]["reasons"])
    assert "why the first wins" in output and plan["search"]["settings"][0] in output
    # What the search calls best is what a plan of the same settings says.
    again = tmp_path / "again.json"
    assert (
        run_tool(
            monkeypatch,
            *arguments[:-1],
            "--json",
            str(again),
            *settings,
            *plan["search"]["settings"],
        )  # fmt: skip
        == 0
    )
    assert json.loads(again.read_text())["iteration"] == plan["iteration"]
    documented = (ROOT / "docs" / "scaling.md").read_text()
    for key in keys(plan):
        assert f"`{key}`" in documented, f"docs/scaling.md does not explain {key}"


def keys(value, inside: str = "") -> set[str]:
    """Every key of the JSON, except names of modules, ranks and assumptions."""
    if isinstance(value, list):
        return set().union(*(keys(item) for item in value)) if value else set()
    if not isinstance(value, dict):
        return set()
    if inside in ("assumptions", "per_sample", "per_iteration", "memory_gib", "groups"):
        return set()
    if inside == "ranks":
        return set().union(*(keys(item) for item in value.values()))
    return set(value) | set().union(*(keys(item, key) for key, item in value.items()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "a100-80", "--num-gpus", "255"], ["255 ranks", "254 or 256"]),
        (
            ["--gpu", "a100-80", "--num-gpus", "256", "score.ranks_per_replica=2"],
            ["256 ranks", "255 or 258"],
        ),
        (["--gpu", "a100-80", "--assume", "unett=0.3"], ["unett", "unet"]),
        (["--gpu", "a100-80", "training.global_batch_size=1000"], ["1000", "960 or 1024"]),
    ],
)
def test_bad_input_ends_with_2_and_a_remedy(monkeypatch, capsys, arguments, words):
    config = str(ROOT / "examples" / "configs" / "instruct_256gpu.yaml")
    if "training.global_batch_size=1000" in arguments:
        arguments = [*arguments, "parallel.world_size=16"]
    assert run_tool(monkeypatch, "--config", config, *arguments) == 2
    output = capsys.readouterr().err
    for word in words:
        assert word in output


def test_a_layout_that_does_not_fit_ends_with_1(monkeypatch, capsys):
    config = str(ROOT / "examples" / "configs" / "instruct_256gpu.yaml")
    code = run_tool(
        monkeypatch, "--config", config, "--gpu", "v100-32", "--num-gpus", "256",
        "training.micro_batch_size=128", "training.global_batch_size=16384",
    )  # fmt: skip
    output = capsys.readouterr().out
    assert code == 1 and "TOO LARGE" in output
    assert "training.precision=fp16" in output  # V100 has no bf16
