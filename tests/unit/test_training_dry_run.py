"""`--dry-run` of the full-size configs: the published model's counts, ranks and batch."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.planning.dry_run import dry_run_report
from megatron_kosmosg.planning.gpus import GPUS, Efficiency
from megatron_kosmosg.planning.model_counts import ModelPart, count_model
from megatron_kosmosg.planning.plan import make_plan
from megatron_kosmosg.planning.rank_map import rank_table

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def full_size(stage: str, *overrides: str):
    return load_config(CONFIGS / f"{stage}_256gpu.yaml", list(overrides))


@pytest.mark.parametrize(
    ("stage", "trainable", "frozen"),
    [
        ("pretrain", 1_371_794_432, 290_581_504),
        ("align", 476_031_488, 1_785_436_416),
        ("instruct", 1_597_256_192, 1_233_756_331),
    ],
)
def test_full_size_counts_equal_the_authors_model(stage, trainable, frozen):
    report = dry_run_report(full_size(stage))
    assert re.search(
        rf"^total +{trainable:,} +{frozen:,} +{trainable + frozen:,}$", report, re.MULTILINE
    )
    assert "Ranks (256)" in report


LANGUAGE_MODEL = {"embedding": 131_086_336, "decoder": 1_209_094_144, "resampler": 19_015_680}
"""The tied output head adds nothing; the decoder includes its final norm."""
TOWER_TRAINED, TOWER_FROZEN = 12_598_272, 290_581_504


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (
            "pretrain",
            {name: ModelPart(count, 0) for name, count in LANGUAGE_MODEL.items()}
            | {"vision_encoder": ModelPart(TOWER_TRAINED, TOWER_FROZEN)},
        ),
        (
            "align",
            {name: ModelPart(0, count) for name, count in LANGUAGE_MODEL.items()}
            | {
                "vision_encoder": ModelPart(0, TOWER_TRAINED + TOWER_FROZEN),
                "aligner_m": ModelPart(225_461_760, 0),
                "aligner_n": ModelPart(250_569_728, 0),
                "clip_text": ModelPart(0, 123_060_480),
            },
        ),
        (
            "instruct",
            {name: ModelPart(count, 0) for name, count in LANGUAGE_MODEL.items()}
            | {
                "vision_encoder": ModelPart(TOWER_TRAINED, TOWER_FROZEN),
                "aligner_m": ModelPart(225_461_760, 0),
                "unet": ModelPart(0, 859_520_964),
                "vae": ModelPart(0, 83_653_863),
            },
        ),
    ],
)
def test_every_module_of_a_stage_has_the_published_count(stage, expected):
    assert count_model(full_size(stage)).parts == expected


def test_pretrain_batch_is_the_papers():
    report = dry_run_report(full_size("pretrain"))
    assert "1,179,648 tokens an update (576 rows of 2048" in report
    assert "9 per micro-batch x 1 micro-batches x 64 replicas" in report


def test_parameters_per_rank_add_up_to_the_model():
    """Halves of tensor-split parameters and whole replicated ones: both ranks of all stages hold
    the model once, the replicated parts twice, and the tied embedding twice."""
    stages = "parallel.pipeline_model_parallel_size=2"
    one = count_model(full_size("pretrain", stages, "parallel.tensor_model_parallel_size=1"))
    two = count_model(full_size("pretrain", stages, "parallel.tensor_model_parallel_size=2"))
    embedding = 2048 * (64128 - 64007)  # padding that one rank adds to the published count
    tied_copy = 2048 * 64128
    assert sum(r.trainable + r.frozen for r in one.ranks) == (
        one.trainable + one.frozen + embedding + tied_copy
    )
    for rank_one, rank_two in zip(one.ranks, two.ranks, strict=True):
        assert rank_two.trainable < 0.52 * rank_one.trainable or rank_one is one.ranks[0]
    assert two.ranks[1].frozen == 0


def test_rank_table_follows_megatrons_order():
    config = load_config(
        None,
        [
            "stage=pretrain",
            "logging.output_dir=x",
            "parallel.tensor_model_parallel_size=2",
            "parallel.pipeline_model_parallel_size=2",
        ],
    )
    assert rank_table(rank_grid(config, 8)).splitlines()[1:] == [
        "  replica 0: pipeline stage 0: ranks 0, 1 -> pipeline stage 1: ranks 4, 5",
        "  replica 1: pipeline stage 0: ranks 2, 3 -> pipeline stage 1: ranks 6, 7",
    ]


def test_uneven_pipeline_is_counted_where_it_is():
    config = full_size("align", "parallel.pipeline_model_parallel_size=2",
                       "parallel.pipeline_layout=decoder*24|M,N")  # fmt: skip
    first, second = count_model(config).ranks
    assert first.trainable == 0
    assert second.trainable == 476_031_488 and second.frozen == 123_060_480
    assert "AlignerNet M" in second.holds and "decoder" not in second.holds


def test_interleaved_stages_are_counted_on_their_ranks():
    """Of 4 ranks with 2 stages each, rank 1 holds stages 1 and 5."""
    plain = [
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=4",
        "training.micro_batch_size=1",
        "training.global_batch_size=512",
    ]
    layout = "|".join(["decoder*3"] * 8)
    interleaved = full_size(
        "pretrain",
        *plain,
        "parallel.virtual_pipeline_model_parallel_size=2",
        f"parallel.pipeline_layout={layout}",
    )
    ranks = count_model(interleaved).ranks
    assert ranks[1].holds == "decoder layers 3-5; decoder layers 15-17"
    assert ranks[1] == dataclasses.replace(ranks[2], holds=ranks[1].holds)
    held = sum(rank.trainable + rank.frozen for rank in ranks)
    assert held == sum(
        rank.trainable + rank.frozen for rank in count_model(full_size("pretrain", *plain)).ranks
    )
    with pytest.raises(ConfigError, match="interleaved pipeline stages are not planned"):
        make_plan(interleaved, 256, GPUS["h100-80"], Efficiency(), [])
