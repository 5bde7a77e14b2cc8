"""The image tower's frozen blocks run before a wait for score ranks, and change no number."""

from __future__ import annotations

import json

import pytest

from megatron_kosmosg.config.paths import trace_file
from megatron_kosmosg.models.vision_encoder import VisionEncoder
from megatron_kosmosg.training.metrics import METRICS_FILE
from tests.support.ranks import run_ranks
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion
from tests.support.trace_case import Pause, tiny_run

UPDATES, MICRO_BATCHES, ROWS = 3, 4, 2
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2, "pipeline_layout": "decoder*2|decoder*1,M"}
LAYOUTS = {
    "one_rank": (2, {}, 1),
    "tp2": (3, TP2, 2),
    "pp2": (3, PP2, 2),
}
"""{name: (ranks, settings, `score.window`)}."""


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("sd"))


def plain_run(config) -> None:
    """The run as it is where no block is frozen: nothing is computed ahead."""
    VisionEncoder.frozen_blocks = lambda self: []
    tiny_run(config, Pause())


def run(stable_diffusion, folder, name, target, *arguments, traced=None):
    num_ranks, parallel, window = LAYOUTS[name]
    config = tiny_config("instruct", stable_diffusion, folder, **parallel)
    config = replace_section(config, "score", placement="dedicated", window=window)
    config = replace_section(
        config,
        "training",
        train_iters=UPDATES,
        global_batch_size=ROWS * MICRO_BATCHES,
        micro_batch_size=ROWS,
        eval_interval=1,
        eval_iters=1,
        recompute="full",
    )
    config = replace_section(config, "data", heldout=config.data.blend)
    config = replace_section(config, "optimizer", lr_warmup_iters=1)
    config = replace_section(config, "logging", trace_iteration=traced, tensorboard=False)
    run_ranks(num_ranks, target, config, *arguments)
    return config


def numbers(config, folder):
    lines = map(json.loads, (folder / METRICS_FILE).read_text().splitlines())
    names = ("loss", "grad_norm", "heldout_loss", "images", "num_images")
    return [{n: line[n] for n in names if n in line} for line in lines]


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_number_changes(name, stable_diffusion, tmp_path):
    found, expected = (tmp_path / each for each in ("ahead", "plain"))
    ahead = run(stable_diffusion, found, name, tiny_run, Pause(), traced=2)
    plain = run(stable_diffusion, expected, name, plain_run)
    got = numbers(ahead, found)
    assert len(got) >= UPDATES and got == numbers(plain, expected)
    events = json.loads(trace_file(ahead).read_text())["traceEvents"]
    order = [
        event["cat"]
        for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"])
        if event["pid"] == 0 and event["cat"] in ("forward", "images ahead", "wait for answer")
    ]
    assert "images ahead" in order
