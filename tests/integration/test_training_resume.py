"""A run that was killed and started again equals one that was not, on its own layout to the bit."""

from __future__ import annotations

import os
import random
import shutil

import pytest
import torch

from megatron_kosmosg.checkpoint import save_and_resume
from megatron_kosmosg.checkpoint.folder import is_valid
from megatron_kosmosg.checkpoint.rng_state import rng_state
from megatron_kosmosg.parallel.seeds import rng_tracker
from tests.support.fake_stage import BAD_ABOVE, FakeDataset, fake_config
from tests.support.ranks import run_ranks
from tests.support.run_metrics import curve, norms, train_lines
from tests.support.training_runs import train, train_until

TP2 = {"tensor_model_parallel_size": 2}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, TP2), (2, {}), (1, {"use_distributed_optimizer": False})],
    ids=["tp2", "dp2", "one-plain-optimizer"],
)
def test_resume_is_bit_exact(tmp_path, ranks, parallel, precision):
    """With dropout, evaluation in between, and for each case an iteration of the end drawn."""
    stop = random.randint(1, 5)
    common = {"parallel": parallel, "training": {"precision": precision, "eval_interval": 2}}
    checkpoint = {"save_interval": stop}
    straight = fake_config(str(tmp_path / "straight"), **common)
    broken = fake_config(str(tmp_path / "broken"), checkpoint=checkpoint, **common)
    run_ranks(ranks, train, straight, {"dropout": 0.2})
    run_ranks(ranks, train_until, broken, stop, {"dropout": 0.2})
    assert len(curve(tmp_path / "broken")) == stop
    run_ranks(ranks, train, broken, {"dropout": 0.2})
    assert curve(tmp_path / "broken") == curve(tmp_path / "straight"), f"ended after {stop}"
    assert norms(tmp_path / "broken") == norms(tmp_path / "straight"), f"ended after {stop}"


def test_resume_with_overlapped_gathering_is_bit_exact(tmp_path):
    """A save right after an update must not store shares that were not gathered yet."""
    parallel = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    common = {"parallel": parallel, "training": {"precision": "bf16", "eval_interval": 2}}
    straight = fake_config(str(tmp_path / "straight"), **common)
    broken = fake_config(str(tmp_path / "broken"), checkpoint={"save_interval": 3}, **common)
    run_ranks(2, train, straight)
    run_ranks(2, train_until, broken, 3)
    run_ranks(2, train, broken)
    assert curve(tmp_path / "broken") == curve(tmp_path / "straight")


def train_as_a_gpu_saves(config, iterations):
    """Random states of a GPU: one more, and all of its generator's 16 bytes."""
    of_gpu = torch.zeros(16, dtype=torch.uint8)

    def state():
        found = rng_state()
        return found | {"device": of_gpu, "tracker": dict.fromkeys(found["tracker"], of_gpu)}

    save_and_resume.rng_state = state
    return train_until(config, iterations)


def train_and_draw(config):
    """As attention's dropout draws."""
    train(config)
    with rng_tracker().fork():
        return torch.rand(1).item()


def test_a_run_goes_on_from_a_gpu_to_a_cpu(tmp_path, capfd):
    broken = fake_config(str(tmp_path / "broken"), checkpoint={"save_interval": 3})
    run_ranks(1, train_as_a_gpu_saves, broken, 3, start_method="spawn")
    # A rank of the server would write where the server was started, maybe in another test.
    run_ranks(1, train_and_draw, broken, start_method="spawn")
    assert len(curve(tmp_path / "broken")) > 3
    assert "another kind of device" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("first", "second"),
    [((2, TP2), (1, {})), ((2, TP2), (2, {})), ((2, {}), (2, TP2)), ((1, {}), (2, {}))],
    ids=["tp2-to-one", "tp2-to-dp2", "dp2-to-tp2", "one-to-dp2"],
)
def test_a_checkpoint_continues_on_another_layout(tmp_path, first, second):
    checkpoint = {"save_interval": 3}
    run_ranks(1, train, fake_config(str(tmp_path / "straight")))
    (ranks, parallel), folder = first, str(tmp_path / "b")
    config = fake_config(folder, parallel=parallel, checkpoint=checkpoint)
    run_ranks(ranks, train_until, config, 3)
    ranks, parallel = second
    run_ranks(ranks, train, fake_config(folder, parallel=parallel, checkpoint=checkpoint))
    assert curve(tmp_path / "b") == pytest.approx(curve(tmp_path / "straight"), rel=1e-5)
    assert norms(tmp_path / "b") == pytest.approx(norms(tmp_path / "straight"), rel=1e-4)
    bad = [[line["bad_samples"] for line in train_lines(tmp_path / n)] for n in ("b", "straight")]
    dataset = FakeDataset("train")
    each = [sum(bool(dataset[8 * i + j][0] > BAD_ABOVE) for j in range(8)) for i in range(6)]
    assert bad[0] == bad[1] == [sum(each[: i + 1]) for i in range(6)] and bad[0][-1] > 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed_first", [True, False], ids=["to-plain", "from-plain"])
def test_a_checkpoint_continues_with_the_other_kind_of_optimizer(
    tmp_path, precision, distributed_first
):
    """On two replicas: the same state under other keys and at another depth."""
    common = {"training": {"precision": precision}, "checkpoint": {"save_interval": 3}}

    def config(is_distributed: bool):
        parallel = {"use_distributed_optimizer": is_distributed}
        return fake_config(str(tmp_path), parallel=parallel, **common)

    run_ranks(2, train, config(distributed_first))
    straight = curve(tmp_path), norms(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "iter_0000006")
    run_ranks(2, train, config(not distributed_first))
    assert curve(tmp_path) == pytest.approx(straight[0], rel=1e-6)
    assert norms(tmp_path) == pytest.approx(straight[1], rel=1e-5)


def test_background_saves_end_as_whole_checkpoints(tmp_path):
    checkpoint = {"save_interval": 2, "async_save": True, "keep_last": 2}
    config = fake_config(str(tmp_path), checkpoint=checkpoint)
    run_ranks(2, train, config)
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["iter_0000004", "iter_0000006"]
    assert all(is_valid(path) for path in saved)
    straight = curve(tmp_path)
    os.truncate(saved[1] / ".metadata", 10)  # the newest is damaged: the one before it is taken
    run_ranks(2, train, config)
    assert curve(tmp_path) == straight
    assert [line["iteration"] for line in train_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert is_valid(saved[1])
