"""Plans of dedicated score ranks: bytes against real ranks, rows that are split, the dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.planning.dry_run import dry_run_report
from megatron_kosmosg.planning.gpus import Efficiency
from megatron_kosmosg.planning.memory import rank_kinds
from megatron_kosmosg.planning.model_counts import build_shards, model_shares, whole_model
from megatron_kosmosg.planning.workload import MicroBatch, score_share
from tests.support.measured_memory import measured_apart
from tests.support.ranks import run_ranks
from tests.support.tiny_models import (
    TARGET_SIZE,
    replace_section,
    tiny_config,
    write_stable_diffusion,
)

CONFIG = Path(__file__).parents[2] / "examples" / "configs" / "instruct_256gpu.yaml"


@pytest.mark.parametrize(
    ("parallel", "ranks", "count", "window"),
    [({}, 2, 3, 3), ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 4, 2, 2)],
)
def test_memory_is_within_15_percent_of_the_measured_peak(tmp_path, parallel, ranks, count, window):
    rows, length = 12, 60
    config = tiny_config("instruct", write_stable_diffusion(tmp_path), tmp_path, **parallel)
    config = replace_section(
        config, "training", micro_batch_size=rows, global_batch_size=count * rows
    )
    config = replace_section(config, "data", target_image_size=TARGET_SIZE, seq_length=length)
    num_score = ranks - config.parallel.tensor_model_parallel_size
    config = replace_section(
        config, "score", placement="dedicated", ranks_per_replica=num_score, window=window
    )
    world = rank_grid(config, ranks)
    shards = {shard.kind: shard for shard in build_shards(config, world)}
    shares = model_shares(config, whole_model(config))
    batches = [MicroBatch(rows, rows + 1, length, rows / 2)] * count
    planned = {kind.name: kind.memory for kind in rank_kinds(
        config, world, shares, batches, Efficiency())}  # fmt: skip
    measured = run_ranks(ranks, measured_apart, config)
    for rank, found in enumerate(measured):
        name = world.coordinates(rank).role
        print(name, found, planned[name])
        assert found["parameters"] == shards[name].parameter_bytes
        assert planned[name].tensors == pytest.approx(found["peak"], rel=0.15)


@pytest.mark.parametrize(
    ("images", "ranks", "count", "expected"),
    [
        (16, 2, 1, (8, 1, 1.0)),  # one micro-batch: each rank takes half of its rows
        (4, 3, 2, (2, 1, 2 / 3)),  # 2 + 2 + 0 of 4 rows
        (4, 2, 4, (4, 2, 1.0)),  # whole micro-batches in turn
    ],
)
def test_rows_are_split_as_in_training(images, ranks, count, expected):
    config = load_config(
        CONFIG,
        [f"training.micro_batch_size={images}", f"score.ranks_per_replica={ranks}",
         "parallel.tensor_model_parallel_size=2", f"parallel.world_size={2 + ranks}"],
    )  # fmt: skip
    share = score_share(config, rank_grid(config, 2 + ranks), count)
    assert (share.images, share.groups, share.used) == expected


def test_dry_run_of_the_shipped_config_names_score_ranks():
    report = dry_run_report(load_config(CONFIG, ["model.diffusion.path=null"]))
    assert "tensor 1 x pipeline 1 x data 128 + 1 score of each replica" in report
    assert "replica 127: ranks 254 -> score ranks 255" in report
    assert (
        "score ranks: 943,174,827 held (unet 859,520,964, vae 83,653,863; 1.89 GB in bf16), "
        "none trained on each of 128 ranks" in report
    )
    lines = {line.split()[0]: line.split() for line in report.splitlines() if line.strip()}
    columns = ("decoder", "score")
    for name in columns:
        assert lines[name][1] == "128"
    weights, gradients, optimizer = (float(cell) for cell in lines["score"][2:5])
    assert weights == gradients == optimizer == 0
    assert float(lines["score"][6]) == pytest.approx(943_174_827 * 2 / 2**30, abs=0.01)
    assert float(lines["decoder"][6]) == 0  # no U-Net beside the decoder
    assert "8 per micro-batch x 1 micro-batches x 128 replicas" in report


def test_dry_run_of_the_colocated_override():
    report = dry_run_report(load_config(CONFIG, [
        "model.diffusion.path=null", "score.placement=colocated", "training.micro_batch_size=4",
    ]))  # fmt: skip
    assert "tensor 1 x pipeline 1 x data 256\n" in report
    assert "score ranks" not in report and "AlignerNet M, U-Net and VAE" in report
    assert "4 per micro-batch x 1 micro-batches x 256 replicas" in report
