"""`kosmosg status`: what a run's folder says of the run."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from megatron_kosmosg.cli import status as command
from megatron_kosmosg.config.load import load_config, to_yaml
from megatron_kosmosg.launcher import node_name
from megatron_kosmosg.monitoring.lost_ranks import note_lost_rank
from megatron_kosmosg.monitoring.run_owner import Holder
from megatron_kosmosg.monitoring.run_status import run_status

HOLDER = Holder("t", "n01", "", 7, "", "99", 0, "ada", "2026-01-01 00:00:00 +0000")
TOTAL = 200


def make_run(
    folder: Path,
    iterations: int = 100,
    *,
    owned: bool = True,
    beat: float | None = -600.0,
    stall: str | None = None,
    failure: str | None = None,
    checkpoint: int | None = None,
) -> Path:
    """A folder as a run leaves it. beat: seconds since the sign of life, by a clock that is ahead
    unless it is given: no slowness of the test makes it old. Two seconds an iteration;
    an earlier start, faster and with a pause behind it, has made the first half."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = [f"logging.output_dir={folder}", f"training.train_iters={TOTAL}"]
    (folder / "config.yaml").write_text(to_yaml(load_config("debug_pretrain", settings)))
    now, half = time.time(), iterations // 2
    lines = [
        {"iteration": i, "loss": 10.0 - i / 100, "lr": 1e-3, "samples_per_sec": 4.0}
        | {"time": now - 9999 + i, "wall_time": i}
        for i in range(1, half + 1)
    ]
    lines += [
        {"iteration": i, "loss": 10.0 - i / 100, "lr": 1e-3, "samples_per_sec": 4.0}
        | {"time": now - 2 * (iterations - i), "wall_time": 2 * (i - half)}
        for i in range(half + 1, iterations + 1)
    ]
    lines.append({"iteration": iterations, "heldout_loss": 3.0, "time": now, "wall_time": 500})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"iteration": 1')  # one is being written
    if beat is not None:
        heartbeat = {
            "time": now - beat,
            "iteration": iterations,
            "phase": "training",
            "stall": stall,
        }
        (folder / "heartbeat.json").write_text(json.dumps(heartbeat))
    if owned:
        (folder / "owner.json").write_text(json.dumps(dataclasses.asdict(HOLDER)))
    if failure is not None:
        (folder / "failure.txt").write_text(failure)
    if checkpoint is not None:
        saved = folder / "checkpoints" / f"iter_{checkpoint:07d}"
        saved.mkdir(parents=True)
        (saved / "complete.json").write_text("{}")
        (folder / "checkpoints" / "iter_0000150").mkdir()  # under way
    return folder


def shown(folder: Path, capsys) -> tuple[int, str]:
    code = command.main([str(folder)])
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("waits", "idle", "ranks", "words"),
    [
        (0.5, 0.0, 2, "5 score ranks instead of 2 would keep up"),
        (0.3, 0.6, 2, "2 score ranks suffice, a wider score.window overlaps more"),
        (0.0, 0.6, 8, "4 of the 8 score ranks would do"),
        (0.01, 0.1, 4, "4 score ranks fit"),
    ],
)
def test_the_number_of_score_ranks_is_judged(tmp_path, capsys, waits, idle, ranks, words):
    folder = make_run(tmp_path / "run")
    assert "score ranks:" not in shown(folder, capsys)[1]
    score = {"decoder_idle": waits, "score_idle": idle, "score_ranks": ranks}
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:-1]
    changed = [json.dumps(json.loads(line) | score) + "\n" for line in lines]
    (folder / "metrics.jsonl").write_text("".join(changed))
    output = shown(folder, capsys)[1]
    measured = f"decoder ranks wait {waits:.0%} of the time, score ranks {idle:.0%}"
    assert f"score ranks: {measured}: {words}" in output


def test_lost_score_ranks_of_this_start_are_named_with_what_to_do(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    assert "lost:" not in shown(folder, capsys)[1]
    holder = dataclasses.asdict(HOLDER) | {"since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    (folder / "owner.json").write_text(json.dumps(holder))
    error = "Traceback (most recent call last):\nArithmeticError: no numbers\n"
    note_lost_rank(folder, "score rank 3", "failed", error)
    text = (folder / "lost_ranks.txt").read_text()
    earlier = text.replace(text[:19], "2026-01-01 00:00:00").replace("rank 3", "rank 5")
    (folder / "lost_ranks.txt").write_text(earlier + text)
    note_lost_rank(folder, "score rank 2", "was ended by SIGKILL")
    node = node_name()
    names = f"score rank 3 on {node} failed; score rank 2 on {node} was ended by SIGKILL"
    code, said = shown(folder, capsys)
    assert code == 0
    assert f"lost: {names} (lost_ranks.txt says more). The run goes on without; " in said
    assert f"kosmosg score-rank --run {folder}, from any job, can take the place of one" in said
    (folder / "owner.json").unlink()
    at = time.time() - 60
    os.utime(folder / "config.yaml", (at, at))
    assert "The next start begins with all of them" in shown(folder, capsys)[1]
    os.utime(folder / "config.yaml", (at + 120, at + 120))  # a start without losses
    assert "lost:" not in shown(folder, capsys)[1]


def test_the_hardware_that_answered_is_named(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    assert "answered by" not in shown(folder, capsys)[1]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    for line in lines[-21:-1:10]:  # as every logging interval has it
        line |= {"score_answers/NVIDIA L40S": 1, "score_answers/NVIDIA H100": 999.0}
    lines[3] |= {"score_answers/NVIDIA A100": 7}  # of an earlier start
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = "answered by: 1,998 (100%) from NVIDIA H100, 2 (0%) from NVIDIA L40S\n"
    assert told in shown(folder, capsys)[1]


def test_a_run_at_work(tmp_path, capsys):
    code, output = shown(make_run(tmp_path / "run", checkpoint=50), capsys)
    assert code == 0
    assert f"pretrain in {tmp_path / 'run'}: running" in output
    assert "iteration 100 of 200 (50.0%), 3:20 left" in output  # 100 x 2 s
    assert "loss 9.0000, 4.0 samples/s" in output
    assert "sign of life 0:00 ago (training)" in output
    assert "newest checkpoint iter_0000050" in output and "GiB free" in output
    assert "owner: Slurm job 99, process 7 of ada on n01" in output and "error" not in output


@pytest.mark.parametrize(
    ("how", "state", "code"),
    [
        ({"beat": 300.0}, "silent", 1),
        ({"stall": "stall: held up by rank 3"}, "stalled", 1),
        ({"beat": None, "iterations": 0}, "starting", 0),
        ({"owned": False, "failure": "rank 0 failed:\nRuntimeError: no memory\n"}, "failed", 1),
        ({"owned": False}, "stopped", 1),
        ({"owned": False, "iterations": TOTAL, "checkpoint": TOTAL}, "done", 0),
        ({"owned": False, "iterations": TOTAL, "checkpoint": 100}, "stopped", 1),
    ],
)
def test_every_state_has_its_word_and_its_code(tmp_path, capsys, how, state, code):
    folder = make_run(tmp_path / "run", **how)
    assert run_status(folder).state == state
    found, output = shown(folder, capsys)
    assert found == code
    if state == "failed":
        assert "last error: RuntimeError: no memory" in output


def test_json_has_the_same(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    assert command.main([str(folder), "--json", str(tmp_path / "status.json")]) == 0
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["iteration"], found["train_iters"]) == ("running", 100, TOTAL)
    assert found["seconds_left"] == pytest.approx(200, rel=0.05)
    assert found["checkpoint"] is None
    assert command.main([str(folder), "--json", str(folder / "status.json")]) == 2
    assert "give another --json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["heartbeat.json", "owner.json", "metrics.jsonl"])
def test_a_damaged_file_is_no_end_of_the_answer(tmp_path, capsys, name):
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(b"\xff{")
    _, output = shown(folder, capsys)
    assert "pretrain in" in output


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    assert "is no folder of a run" in capsys.readouterr().err
