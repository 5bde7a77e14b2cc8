"""The three real stages on the toy world, one after the other, on two ranks as shipped.

Each is also ended at a random iteration and started again: losses, gradient norms and the held-out
loss of the end must be those of the uninterrupted run to the bit, with dropout, data order, noise
and timesteps included.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from megatron_kosmosg.config.batching import data_parallel_size, num_microbatches
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.normalise import target_pixels
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.models.diffusion import load_vae, vae_fingerprint
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.preprocess.latent_moments import LatentJob, cache_latents
from megatron_kosmosg.stages import build_stage
from megatron_kosmosg.toy import assets
from megatron_kosmosg.training.loop import fit
from tests.support import toy_runs
from tests.support.ranks import run_ranks
from tests.support.toy_runs import ITERATIONS, records, write_data

STAGES = ("pretrain", "align", "instruct")
DROPOUT = ("model.decoder.hidden_dropout=0.1", "model.resampler.attention_dropout=0.1")


class Ended(Exception):
    """Stands for a process that ends between two iterations."""


class EndingStage:
    """A stage whose process ends in the middle of an iteration."""

    def __init__(self, stage, forward_passes: int) -> None:
        self._stage, self._left = stage, forward_passes

    def __getattr__(self, name):
        return getattr(self._stage, name)

    def forward_step(self, data_iterator, model):
        if model.training and self._left == 0:
            raise Ended
        self._left -= model.training
        return self._stage.forward_step(data_iterator, model)


def train(config: RunConfig, forward_passes: int | None = None) -> None:
    """Trains on this rank; ends without a goodbye after `forward_passes`, if given."""
    context = platform.initialize(config)
    try:
        stage = build_stage(config, context)
        if forward_passes is not None:
            stage = EndingStage(stage, forward_passes)
        fit(stage, config, context)
    except Ended:
        pass
    finally:
        platform.teardown()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_data(folder)
    return folder


def config_of(
    stage: str, data: Path, output_dir: Path, previous: Path | None, *more: str
) -> RunConfig:
    return toy_runs.config_of(stage, data, output_dir, previous, *DROPOUT, *more)


@pytest.fixture(scope="module")
def uninterrupted(data) -> Path:
    previous = None
    for stage in STAGES:
        run_ranks(2, train, config_of(stage, data, data / stage, previous), timeout=240)
        previous = data / stage
    return data


TP2 = ("parallel.tensor_model_parallel_size=2",)


@pytest.mark.parametrize(
    ("stage", "layout"),
    [("pretrain", ()), ("align", ()), ("instruct", ()), ("instruct", TP2)],
    ids=["pretrain-tp2-sp", "align-dp2", "instruct-dp2", "instruct-tp2"],
)
def test_stage_trains_and_resumes_to_the_bit(stage, layout, uninterrupted, tmp_path):
    before = STAGES[STAGES.index(stage) - 1] if stage != "pretrain" else None
    previous = None if before is None else uninterrupted / before
    straight = uninterrupted / stage
    if layout:
        straight = tmp_path / "straight"
        config = config_of(stage, uninterrupted, straight, previous, *layout)
        run_ranks(2, train, config, timeout=240)
    expected = records(straight)
    losses = [loss for _, loss, *_ in expected if loss is not None]
    assert len(losses) == ITERATIONS and all(map(math.isfinite, losses))
    assert expected[-1][-1] is not None  # the held-out loss of the final parameters
    stop = random.randint(1, ITERATIONS - 1)
    interval = f"checkpoint.save_interval={stop}"
    config = config_of(stage, uninterrupted, tmp_path / "run", previous, interval, *layout)
    replicas = data_parallel_size(config, 2)
    passes = stop * num_microbatches(config, replicas) + 1
    run_ranks(2, train, config, passes, timeout=240)
    assert len(records(tmp_path / "run")) == stop
    run_ranks(2, train, config, timeout=240)
    assert records(tmp_path / "run") == expected, f"ended after {stop}"


NO_DROPOUT = ("model.decoder.hidden_dropout=0", "model.resampler.attention_dropout=0")


def test_instruct_learns_the_same_from_cached_moments_and_from_balanced_batches(
    uninterrupted, tmp_path
):
    """Two updates on two ranks: moments differ by half precision, batches by the order of sums."""
    vae = load_vae(assets.path() / "stable-diffusion", torch.float32)
    for kind in ("compositional", "edit", "caption"):
        store = SampleStore(uninterrupted / "data" / "train" / kind)
        job = LatentJob(store, "moments", target_pixels(32), "fp32")
        output = (0, 1, lambda done, total: None)
        cached = cache_latents(job, vae, vae_fingerprint(vae), ImageDecoder("auto"), *output)
        assert cached.is_complete and cached.bad.count == 0
    curves = {}
    for name, changes in {
        "plain": ("data.balance_tokens=false",),
        "balanced": ("data.balance_tokens=true",),
        "cached": ("data.balance_tokens=true", "data.latent_cache=moments"),
    }.items():
        more = (*NO_DROPOUT, "training.train_iters=2", "logging.num_images=1", *changes)
        config = config_of(
            "instruct", uninterrupted, tmp_path / name, uninterrupted / "align", *more
        )
        run_ranks(2, train, config, timeout=240)
        curves[name] = [row[1] for row in records(tmp_path / name) if row[1] is not None]
    assert len(curves["plain"]) == 2
    assert curves["balanced"] == pytest.approx(curves["plain"], rel=1e-5)
    assert curves["cached"] == pytest.approx(curves["balanced"], rel=1e-3)
    assert curves["cached"] != curves["balanced"]


def test_a_checkpoint_of_the_wrong_stage_is_refused_by_name(uninterrupted, tmp_path):
    previous, single_process = uninterrupted / "pretrain", "parallel.tensor_model_parallel_size=1"
    config = config_of("instruct", uninterrupted, tmp_path / "run", previous, single_process)
    with pytest.raises(RuntimeError, match="pretrain.*align|align.*pretrain"):
        run_ranks(1, train, config, timeout=240)
