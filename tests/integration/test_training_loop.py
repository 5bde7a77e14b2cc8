"""The loop on real ranks with a tiny stage: files, layouts, bad numbers, strict starts."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from megatron_kosmosg.checkpoint.folder import latest_valid
from megatron_kosmosg.training.stage import InitialWeights
from tests.support.fake_stage import fake_config
from tests.support.ranks import run_ranks
from tests.support.run_metrics import curve, lines, norms, train_lines
from tests.support.training_runs import SignalAt, beside_torch_adamw, refused, train, train_until

TP2 = {"tensor_model_parallel_size": 2}


def test_metrics_lines_have_the_documented_fields(tmp_path):
    config = fake_config(str(tmp_path), logging={"tensorboard": True}, training={"train_iters": 3})
    assert run_ranks(1, train, config) == [True]
    first = train_lines(tmp_path)[0]
    assert set(first) == {
        "iteration", "loss", "largest_loss", "lr", "grad_norm", "samples_per_sec",
        "tokens_per_sec", "tflops", "mfu", "data_wait", "padding", "consumed_train_samples",
            "bad_samples", "time", "wall_time",
    }  # fmt: skip
    assert [line["consumed_train_samples"] for line in train_lines(tmp_path)] == [8, 16, 24]
    assert first["tokens_per_sec"] == pytest.approx(3 * first["samples_per_sec"])
    # 8 rows x 1e6 FLOP; mfu is its share of 989 TFLOP/s
    assert first["tflops"] == pytest.approx(first["samples_per_sec"] * 1e6 / 1e12)
    assert first["mfu"] == pytest.approx(first["tflops"] / 989)
    assert 0 <= first["data_wait"] <= 1
    heldout = [line for line in lines(tmp_path) if "lr" not in line]
    assert [line["iteration"] for line in heldout] == [3]
    assert {"heldout_loss", "heldout_answer"} <= set(heldout[0])
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert b"train/loss$" in events.read_bytes() and b"heldout/heldout_loss$" in events.read_bytes()
    assert (tmp_path / "config.yaml").is_file()


def test_updates_follow_an_independent_adamw_with_decay_on_every_tensor(tmp_path):
    settings = {"lr": 0.02, "lr_warmup_iters": 2, "weight_decay": 0.1, "clip_grad": 0.3}
    config = fake_config(str(tmp_path), optimizer=settings, training={"train_iters": 4})
    ((rates, expected, got),) = run_ranks(1, beside_torch_adamw, config)
    assert [line["lr"] for line in train_lines(tmp_path)] == pytest.approx(rates)
    assert any(norm > 0.3 for norm in norms(tmp_path))  # clipping took part
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("ranks", "parallel", "training"),
    [
        (2, TP2, {}),
        (2, {}, {}),
        (2, {"use_distributed_optimizer": False}, {}),
        (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, {}),
        (4, TP2, {"micro_batch_size": 1}),
    ],
    ids=["tp2", "dp2", "dp2-plain-optimizer", "dp2-overlap", "tp2-dp2-micro1"],
)
def test_every_layout_learns_the_same(tmp_path, ranks, parallel, training):
    run_ranks(1, train, fake_config(str(tmp_path / "one")))
    run_ranks(
        ranks, train, fake_config(str(tmp_path / "many"), parallel=parallel, training=training)
    )
    assert curve(tmp_path / "many") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)
    assert norms(tmp_path / "many") == pytest.approx(norms(tmp_path / "one"), rel=1e-4)
    ends = [lines(tmp_path / name)[-1]["heldout_loss"] for name in ("one", "many")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@pytest.mark.parametrize(
    ("number", "iteration"),
    [(signal.SIGTERM, 3), (signal.SIGUSR1, 1)],
    ids=["term", "usr1-in-warm-up"],
)
def test_a_signal_to_one_rank_saves_on_all(tmp_path, number, iteration):
    """The learning rate still rises after iteration 1: the rerun goes on where it stood."""
    run_ranks(2, train, fake_config(str(tmp_path / "straight")))
    config = fake_config(str(tmp_path / "stopped"))
    hit = SignalAt(call=2 * iteration - 2, number=number, rank=1)  # two micro-batches each
    assert run_ranks(2, train, config, {"hook": hit}) == [False, False]
    assert os.listdir(tmp_path / "stopped" / "checkpoints") == [f"iter_{iteration:07d}"]
    assert len(curve(tmp_path / "stopped")) == iteration
    assert run_ranks(2, train, config) == [True, True]
    rates = [line["lr"] for line in train_lines(tmp_path / "stopped")]
    assert rates[:3] == pytest.approx([0.01, 0.02, rates[2]]) and rates[2] < 0.02
    assert curve(tmp_path / "stopped") == curve(tmp_path / "straight")


def test_a_loss_that_is_not_a_number_is_skipped_and_written_as_null(tmp_path):
    run_ranks(2, train, fake_config(str(tmp_path)), {"poison": (2,)})
    assert [line["loss"] is None for line in train_lines(tmp_path)] == [0, 0, 1, 0, 0, 0]
    assert all(loss < 3 for loss in curve(tmp_path)[3:])


def test_too_many_bad_losses_end_the_run(tmp_path):
    config = fake_config(str(tmp_path), training={"max_nonfinite_iters": 2})
    with pytest.raises(RuntimeError, match="FloatingPointError: 2 updates in a row"):
        run_ranks(1, train, config, {"poison": range(6)})
    assert latest_valid(tmp_path / "checkpoints") is None


def test_a_run_whose_last_updates_are_not_finite_has_not_ended_well(tmp_path):
    """Its last state is saved, and starting the finished run again says the same."""
    config = fake_config(str(tmp_path), training={"train_iters": 8})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="FloatingPointError: the last 5 updates .* before"):
            run_ranks(1, train, config, {"poison": range(3, 8)})
        assert latest_valid(tmp_path / "checkpoints").name == "iter_0000008"
    other = fake_config(str(tmp_path / "other"), training={"train_iters": 8})
    assert run_ranks(1, train, other, {"poison": range(4, 8)}) == [True]


def test_too_many_bad_images_end_the_run(tmp_path):
    config = fake_config(str(tmp_path), data={"max_bad_images": 3})
    with pytest.raises(RuntimeError, match=r"undecodable images .* data\.max_bad_images allows 3"):
        run_ranks(2, train, config)
    counts = [line["bad_samples"] for line in train_lines(tmp_path)]
    assert max(counts[:-1]) <= 3 < counts[-1]


def test_a_finished_run_does_nothing_more(tmp_path):
    config = fake_config(str(tmp_path), training={"train_iters": 3})
    run_ranks(1, train, config)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert run_ranks(1, train, config) == [True]
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_initial_weights_are_strict(tmp_path):
    previous, config = str(tmp_path / "previous"), fake_config(str(tmp_path / "next"))
    run_ranks(2, train, fake_config(previous, parallel=TP2))

    def refusal(**rules) -> str:
        initial = InitialWeights(previous, **({"stage": "align"} | rules))
        return run_ranks(1, refused, config, {"initial": initial})[0]

    assert "up.weight" in refusal(absent=("up",))
    assert "norm.bias" in refusal(unused=("norm",))
    message = refusal(stage="pretrain")
    assert "stage align" in message and "pretrain" in message and "checkpoint.load" in message
    run_ranks(1, train, config, {"initial": InitialWeights(previous, "align")})
    assert curve(tmp_path / "next")[0] < curve(tmp_path / "previous")[0]


def test_resume_with_other_maths_is_refused(tmp_path):
    run_ranks(1, train, fake_config(str(tmp_path), training={"train_iters": 3}))
    other = fake_config(str(tmp_path), training={"train_iters": 3}, optimizer={"lr": 0.5})
    assert "optimizer.lr: 0.02 -> 0.5" in run_ranks(1, refused, other)[0]
    same = fake_config(str(tmp_path), training={"train_iters": 3})
    message = run_ranks(1, refused, same, {"content": "other"})[0]
    assert "data.blend.x.content" in message and "same -> other" in message


def test_a_pipeline_stage_without_trainable_parameters_takes_part(tmp_path):
    """Updates and norm equal one rank's; the checkpoint counts Adam's updates although rank 0,
    which writes the common part, has made none."""
    pipeline = {"pipeline_model_parallel_size": 2}
    run_ranks(1, train, fake_config(str(tmp_path / "one")))
    config = fake_config(str(tmp_path / "two"), parallel=pipeline, checkpoint={"save_interval": 3})
    run_ranks(2, train_until, config, 3)
    run_ranks(2, train, config)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)
    assert norms(tmp_path / "two") == pytest.approx(norms(tmp_path / "one"), rel=1e-4)
