"""What happens when a rank fails, is killed or is told to stop, and what the user then reads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_kosmosg.monitoring.run_owner import OWNER_FILE, RunOwner
from tests.support.fake_stage import fake_config
from tests.support.ranks import run_ranks
from tests.support.run_metrics import curve, lines
from tests.support.training_runs import (
    PauseAt,
    SignalAt,
    SignalWhile,
    run_on_taken_port,
    run_program,
    said_while_training,
    train,
    train_and_die_saving,
    train_interrupted,
)


@dataclass(frozen=True)
class FailAt:
    """Raises on one rank at forward pass `call`."""

    call: int
    rank: int

    def __call__(self, call: int) -> None:
        if call == self.call and int(os.environ["RANK"]) == self.rank:
            raise OSError("the disk is on fire")


def test_a_rank_that_raises_ends_all_and_its_error_alone_is_shown(tmp_path):
    config = fake_config(str(tmp_path))
    outcomes = run_ranks(2, run_program, config, {"hook": FailAt(call=4, rank=1)})
    assert [code for code, *_ in outcomes] == [1, 1]
    (_, quiet, _), (_, loud, _) = outcomes
    assert "rank 1 failed" in loud and loud.count("OSError: the disk is on fire") == 1
    reported = [line for line in quiet.splitlines() if line and "Warning" not in line]
    assert "Traceback" not in quiet and any("because of the failure in" in x for x in reported)
    assert "the disk is on fire" in (tmp_path / "failure.txt").read_text()
    assert (
        time.time() - (tmp_path / "failure.txt").stat().st_mtime < config.parallel.timeout_seconds
    )
    codes = [code for code, *_ in run_ranks(2, run_program, config)]
    assert codes == [0, 0] and not (tmp_path / "failure.txt").exists()


def test_a_run_in_another_runs_folder_is_refused_and_leaves_it_as_it_is(tmp_path):
    config = fake_config(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("of the first\n")
    with RunOwner(tmp_path, print) as owner:
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        ((code, error, _),) = run_ranks(1, run_program, config)
        assert code == 2 and error.count("error:") == 1
        assert "belongs to a run that is alive: process" in error and "logging.output_dir" in error
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        owner.check()


@dataclass(frozen=True)
class TakeFolderAt:
    """Puts another owner's name into the folder of the run at forward pass `call` of rank 0."""

    call: int
    folder: Path

    def __call__(self, call: int) -> None:
        if call == self.call and int(os.environ["RANK"]) == 0:
            content = json.loads((self.folder / OWNER_FILE).read_text())
            content |= {"token": "other", "node": "gpu07"}
            (self.folder / OWNER_FILE).write_text(json.dumps(content))


def test_a_run_whose_folder_was_taken_over_writes_nothing_more(tmp_path):
    config = fake_config(str(tmp_path))
    ((code, error, _),) = run_ranks(1, run_program, config, {"hook": TakeFolderAt(4, tmp_path)})
    assert code == 2 and "was taken over" in error and "gpu07" in error
    written = {path.name for path in tmp_path.rglob("*")}
    assert json.loads((tmp_path / OWNER_FILE).read_text())["token"] == "other"
    assert "failure.txt" not in written and "iter_0000004" not in written
    assert max(line["iteration"] for line in lines(tmp_path)) < 4


def test_exit_code_85_asks_to_be_started_again(tmp_path):
    config = fake_config(str(tmp_path))
    hook = SignalAt(call=4, number=signal.SIGUSR1, rank=0)
    outcomes = run_ranks(2, run_program, config, {"hook": hook})
    assert [code for code, *_ in outcomes] == [85, 85]


@pytest.mark.parametrize(
    "when",
    [
        SignalWhile(rank=1, split="train"),
        SignalWhile(rank=0, split="heldout"),
        SignalWhile(rank=1, split="train", reads=True),
    ],
    ids=["train-build", "heldout-build", "first-read"],
)
def test_a_signal_to_one_rank_before_the_first_iteration_stops_all(tmp_path, when):
    config = fake_config(str(tmp_path))
    outcomes = run_ranks(2, train_interrupted, config, when)
    assert [finished for finished, _ in outcomes] == [False, False]
    assert not (tmp_path / "checkpoints").exists()
    run_ranks(2, train, config)
    assert len(curve(tmp_path)) == 6


@pytest.mark.parametrize("train_iters", [4, 2], ids=["between", "at-the-end"])
def test_a_signal_to_one_rank_in_an_evaluation_stops_all_and_it_is_made_up_for(
    tmp_path, train_iters
):
    training = {"train_iters": train_iters, "eval_interval": 2, "eval_iters": 6}
    sections = {"training": training, "optimizer": {"lr_warmup_iters": 1}}
    config = fake_config(str(tmp_path / "stopped"), **sections)
    when = SignalWhile(rank=1, call=3)
    outcomes = run_ranks(2, train_interrupted, config, when)
    assert [finished for finished, _ in outcomes] == [False, False]
    assert [line["iteration"] for line in lines(tmp_path / "stopped")] == [1, 2]
    assert run_ranks(2, train, config) == [True, True]
    run_ranks(2, train, fake_config(str(tmp_path / "straight"), **sections))

    def numbers(folder):
        return [
            (line["iteration"], line.get("loss"), line.get("heldout_loss"))
            for line in lines(tmp_path / folder)
        ]

    assert numbers("stopped") == numbers("straight")


@pytest.mark.parametrize(
    ("rank", "whole", "reader", "words"),
    [
        (1, False, 0, "held up by rank 1 on {node}"),
        (1, True, 0, "no sign of life from rank 1 on {node}"),
        (0, True, 1, "no sign of life from rank 0 on {node}"),
    ],
    ids=["stuck", "frozen", "rank-0-frozen"],
)
def test_the_rank_that_holds_the_others_up_is_named(tmp_path, rank, whole, reader, words):
    config = fake_config(str(tmp_path), parallel={"stall_seconds": 1}, training={"train_iters": 4})
    pause = PauseAt(call=4, rank=rank, seconds=4, whole=whole)
    output = run_ranks(2, said_while_training, config, {"hook": pause})[reader]
    reports = [line for line in output.splitlines() if "stall:" in line]
    named = [line for line in reports if words.format(node=socket.gethostname()) in line]
    assert named, output
    if not whole:
        assert any("training of iteration 3" in line for line in named), named
    assert json.loads((tmp_path / "heartbeat.json").read_text())["iteration"] in (2, 3, 4)


def test_the_metrics_name_a_slow_rank(tmp_path):
    config = fake_config(str(tmp_path), logging={"log_interval": 2}, training={"train_iters": 4})
    run_ranks(2, train, config, {"hook": PauseAt(call=4, rank=1, seconds=3)})
    told = [line for line in lines(tmp_path) if "slowest_rank" in line]
    assert [line["iteration"] for line in told] == [2, 4]
    ratio, median = told[1]["slowest_rank_ratio"], told[1]["median_rank_seconds"]
    assert told[1]["slowest_rank"] == 1
    assert (ratio - 1) * median == pytest.approx(3 / 2, abs=0.75)  # over two iterations


def test_a_port_in_use_is_said_in_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ((code, output, _),) = run_ranks(1, run_on_taken_port, fake_config(str(tmp_path)), port)
    assert (
        code == 2 and f"port {port}" in output and "in use" in output and "Traceback" not in output
    )


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_killed_during_a_save(tmp_path, async_save):
    run_ranks(2, train, fake_config(str(tmp_path / "straight")))
    checkpoint = {"save_interval": 2, "async_save": async_save}
    config = fake_config(str(tmp_path / "killed"), checkpoint=checkpoint)
    with pytest.raises(RuntimeError, match="died without an answer|closed by peer"):
        run_ranks(2, train_and_die_saving, config, 4, 0)
    names = sorted(os.listdir(tmp_path / "killed" / "checkpoints"))
    assert names == ["iter_0000002", "iter_0000004.tmp"]
    run_ranks(2, train, config)
    assert curve(tmp_path / "killed") == curve(tmp_path / "straight")
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.tmp"))


READY = (
    "data.tokenizer_model={tmp}/f",
    "data.blend.x.path={tmp}/x",
    "training.global_batch_size=1",
)
"""Input that is complete as far as it is checked before anything is read."""


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_kosmosg.train", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_help_names_overrides_and_exit_codes():
    result = program("--help")
    assert result.returncode == 0
    assert "section.key=value" in result.stdout and "85" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "missing.yaml"], ["missing.yaml", "no such file"]),
        (["stage=align", "logging.output_dir=x", "modl.vocab_size=3"], ["modl", "model"]),
        (["stage=align", "logging.output_dir={tmp}/run"], ["data.tokenizer_model"]),
        (["stage=pretrain", "logging.output_dir={tmp}/f/run", *READY], ["is a file, not a folder"]),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path, arguments, words):
    for name in ("f", "x.bin", "x.idx"):
        (tmp_path / name).write_text("")
    result = program(*(text.replace("{tmp}", str(tmp_path)) for text in arguments))
    assert result.returncode == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) < 4
