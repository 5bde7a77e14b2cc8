"""The quickstart's machinery, run on small fake steps: reuse, continuing, failing, time left."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from quickstart.progress import RemainingTime, clock, last_record
from quickstart.runner import Interrupted, Runner, StepFailed
from quickstart.steps import BLENDS, STAGES, Step, plan
from quickstart.thresholds import missed, table

from megatron_kosmosg.config.load import load_config

REPOSITORY = Path(__file__).resolve().parents[2]


def script(*lines: str) -> tuple[str, ...]:
    return (sys.executable, "-c", "\n".join(lines))


def writes(path: Path, text: str = "x") -> tuple[str, ...]:
    """A command that appends `text`, so that the file shows how often it ran."""
    return script(f"open({str(path)!r}, 'a').write({text!r})")


def chain(out: Path) -> list[Step]:
    first = Step("first", "first", writes(out / "a"), (out / "a",), 1.0)
    return [first, Step("second", "second", writes(out / "b"), (out / "b",), 1.0, ("first",))]


def run(steps: list[Step], out: Path) -> None:
    Runner(steps, out, REPOSITORY, "fast").run()


def test_a_second_run_repeats_nothing(tmp_path):
    steps = chain(tmp_path)
    run(steps, tmp_path)
    run(steps, tmp_path)
    assert (tmp_path / "a").read_text() == "x"
    assert (tmp_path / "b").read_text() == "x"
    assert (tmp_path / "commands.log").read_text().count("# ") == 2


def test_a_changed_step_runs_anew_with_everything_after_it(tmp_path):
    first, second = chain(tmp_path)
    run([first, second], tmp_path)
    run([replace(first, command=writes(tmp_path / "a", "y")), second], tmp_path)
    assert (tmp_path / "a").read_text() == "y", "old outputs must be removed first"
    record = (tmp_path / "commands.log").read_text()
    assert record.count("second") == 2


def test_a_changed_input_file_runs_the_step_anew(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("lr: 1")
    step = Step("only", "only", writes(tmp_path / "a"), (tmp_path / "a",), 1.0, inputs=(config,))
    run([step], tmp_path)
    config.write_text("lr: 2")
    run([step], tmp_path)
    assert (tmp_path / "commands.log").read_text().count("# ") == 2


def test_a_step_may_run_every_time(tmp_path):
    step = Step("page", "page", writes(tmp_path / "a"), (tmp_path / "a",), 1.0, always=True)
    run([step], tmp_path)
    run([step], tmp_path)
    assert (tmp_path / "commands.log").read_text().count("# ") == 2


def test_a_lost_output_is_made_again(tmp_path):
    steps = chain(tmp_path)
    run(steps, tmp_path)
    (tmp_path / "a").unlink()
    run(steps, tmp_path)
    assert (tmp_path / "a").read_text() == "x"


def test_a_failure_names_the_step_and_shows_the_end_of_its_log(tmp_path):
    bad = Step("bad", "bad step", script("print('the cause')", "raise SystemExit(7)"), (), 1.0)
    with pytest.raises(StepFailed, match=r"the cause[\s\S]*'bad step' ended with exit code 7"):
        run([bad], tmp_path)


def test_a_missed_threshold_is_no_failure_of_the_step_that_finds_it(tmp_path):
    judged = Step("judged", "judged", script("raise SystemExit(3)"), (), 1.0, accepts=(0, 3))
    run([judged, *chain(tmp_path)], tmp_path)
    assert (tmp_path / "b").is_file()
    steps = {step.name: step for step in plan(REPOSITORY, tmp_path, fast=False, ablations=False)}
    assert [name for name, step in steps.items() if 3 in step.accepts] == ["evaluate"]
    assert [step.accepts for step in steps.values()].count((0,)) == len(steps) - 1


def test_a_failed_step_keeps_its_outputs_and_continues(tmp_path):
    target = tmp_path / "folder"
    command = script(
        "import os, sys",
        f"os.makedirs({str(target)!r}, exist_ok=True)",
        f"tries = len(os.listdir({str(target)!r}))",
        f"open({str(target)!r} + '/' + str(tries), 'w').close()",
        "sys.exit(tries == 0)",
    )
    step = Step("train", "train", command, (target,), 1.0)
    with pytest.raises(StepFailed):
        run([step], tmp_path)
    run([step], tmp_path)
    assert sorted(os.listdir(target)) == ["0", "1"]


def test_a_step_that_writes_nothing_is_an_error(tmp_path):
    step = Step("empty", "empty", script("pass"), (tmp_path / "absent",), 1.0)
    with pytest.raises(StepFailed, match="did not write"):
        run([step], tmp_path)


def test_an_interrupt_reaches_the_step_as_sigterm_and_ends_the_run(tmp_path):
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    command = script(
        "import signal, sys, time",
        "def save(*_):",
        f"    open({str(saved)!r}, 'w').close()",
        "    sys.exit(85)",
        "signal.signal(signal.SIGTERM, save)",
        f"open({str(ready)!r}, 'w').close()",
        "time.sleep(60)",
    )

    def interrupt():
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        run([Step("long", "long", command, (), 60.0)], tmp_path)
    thread.join()
    assert saved.exists()
    assert not json.loads((tmp_path / "steps" / "long.json").read_text())["done"]


def test_two_runs_into_one_folder_are_refused(tmp_path):
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    first = Runner([Step("long", "long", command, (), 60.0)], tmp_path, REPOSITORY, "fast")
    second = Runner([], tmp_path, REPOSITORY, "fast")
    refused = []

    def try_then_stop():
        while not (tmp_path / "logs" / "long.log").exists():
            time.sleep(0.05)
        try:
            second.run()
        except StepFailed as error:
            refused.append(str(error))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=try_then_stop)
    thread.start()
    with pytest.raises(Interrupted):
        first.run()
    thread.join()
    assert refused == [f"Another quickstart is running in {tmp_path}."]
    second.run()


def test_the_record_names_the_commands_and_their_times(tmp_path):
    steps = chain(tmp_path)
    run([*steps, Step("page", "page", writes(tmp_path / "c"), (tmp_path / "c",), 1.0)], tmp_path)
    record = json.loads((tmp_path / "quickstart.json").read_text())
    assert [entry["name"] for entry in record["steps"]] == ["first", "second"]
    assert all(entry["command"].startswith("python -c") for entry in record["steps"])
    assert record["steps"][0]["seconds"] > 0


def test_time_remaining_follows_the_training_itself(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    train = Step("t", "t", (), (), 100.0, metrics=metrics, iterations=100)
    progress = RemainingTime([train, replace(train, name="u", seconds=50.0)], io.StringIO())
    progress.begin(0)
    started = time.monotonic()
    assert progress.remaining(started)[1] == pytest.approx(150.0, abs=1.0)
    metrics.write_text('{"iteration": 10, "loss": 1.0}\n')
    progress.remaining(started + 40.0)  # 40 s to start up do not count as slow iterations
    metrics.write_text('{"iteration": 60, "loss": 1.0}\n{"iteration": 7')
    step_left, all_left = progress.remaining(started + 140.0)
    assert step_left == pytest.approx(80.0, rel=0.02)  # 50 iterations took 100 s, 40 are left
    assert all_left == pytest.approx(80.0 + 50.0 * (140.0 + 80.0) / 100.0, rel=0.02)


def test_a_resumed_training_has_less_to_do(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"iteration": 75}\n')
    train = Step("t", "t", (), (), 100.0, metrics=metrics, iterations=100)
    progress = RemainingTime([train], io.StringIO())
    progress.begin(0)
    assert progress.remaining(time.monotonic())[0] == pytest.approx(25.0, abs=1.0)


def test_last_record_survives_a_half_written_line(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert last_record(metrics) == {}
    metrics.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iter')
    assert last_record(metrics) == {"iteration": 2}


def test_clock():
    assert [clock(s) for s in (0.4, 59.6, 3661)] == ["0:00", "1:00", "1:01:01"]


@pytest.mark.parametrize("ablations", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_every_step_comes_after_what_it_reads(tmp_path, fast, ablations):
    seen: set[str] = set()
    for step in plan(REPOSITORY, tmp_path, fast=fast, ablations=ablations):
        assert set(step.after) <= seen, step.name
        assert step.name not in seen
        seen.add(step.name)
        assert all(tmp_path in path.parents for path in step.outputs), "removes only its own"
    assert set(STAGES) <= seen


@pytest.mark.parametrize("stage", STAGES)
def test_the_configs_name_the_datasets_that_are_made(stage):
    config = load_config(REPOSITORY / "examples" / "configs" / f"toy_{stage}.yaml", [])
    assert tuple(config.data.blend) == BLENDS[stage]["train"]
    assert tuple(config.data.heldout) == BLENDS[stage]["heldout"]


@pytest.mark.parametrize("fast", [False, True])
def test_a_seed_is_that_of_the_trainings_and_of_nothing_else(tmp_path, fast):
    usual, seeded = (
        plan(REPOSITORY, tmp_path, fast=fast, ablations=True, seed=n) for n in (None, 3)
    )
    for before, after in zip(usual, seeded, strict=True):
        added = ("training.seed=3",) if before.metrics is not None else ()
        assert tuple(w for w in after.command if w not in before.command) == added, after.name
        if before.metrics is not None:
            config = REPOSITORY / after.command[after.command.index("--config") + 1]
            words = [w for w in after.command if w.startswith("training.")]
            assert load_config(config, words).training.seed == 3


@pytest.mark.parametrize("fast", [False, True])
def test_the_progress_knows_how_long_each_training_is(tmp_path, fast):
    for step in plan(REPOSITORY, tmp_path, fast=fast, ablations=True):
        if step.metrics is not None:
            overrides = [text for text in step.command if text.startswith("training.")]
            config = load_config(
                REPOSITORY / step.command[step.command.index("--config") + 1], overrides
            )
            assert step.iterations == config.training.train_iters
            names = [path.name for path in step.inputs]
            assert len(names) == 2 and names[1] == "toy_base.yaml", "what the config includes"


ROW = dict(group="g", name="hue", value=5.0, unit="deg", threshold=9.0, direction="<=", n=64)
ROW |= dict(seed=0, chance=90.0, ceiling=0.6, passed=True)


def test_the_table_marks_misses_and_missing_values():
    rows = [ROW, ROW | dict(name="shape", value=0.5, passed=False), ROW | dict(threshold=None)]
    rows[2] |= dict(name="bare", chance=None, ceiling=None, seed=None, passed=None)
    text = table(rows)
    assert "MISSED" in text and "<= 9" in text
    assert missed(rows) == ["g: shape"]


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--help"], 0, "usage"),
        (["--no-such-option"], 2, "unknown option: --no-such-option"),
        (["--output"], 2, "--output needs a folder"),
        (["--output", "/proc/none"], 2, "cannot make the folder /proc/none"),
        (["--out", "/proc/none"], 2, "note: --out is called --output today"),
        (["--seed", "one"], 2, "--seed needs a number from 0, not 'one'"),
        (["--seed=4", "--output=/proc/none"], 2, "cannot make the folder /proc/none"),
        (["--out=/proc/none"], 2, "cannot make the folder /proc/none"),
    ],
)
def test_the_script_refuses_bad_arguments_before_installing(arguments, code, message):
    result = subprocess.run(
        ["bash", str(REPOSITORY / "examples" / "quickstart.sh"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code
    assert message in result.stdout + result.stderr


@pytest.mark.parametrize(
    "path",
    [
        "examples/environment.sh",
        "examples/quickstart.sh",
        "tests/run.sh",
        "tests/oldest_versions.sh",
        "tests/second_environment.sh",
        "tests/transformer_engine.sh",
        ".ci/run",
    ],
)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", str(REPOSITORY / path)], check=True)


def in_environment_script(command: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command after sourcing examples/environment.sh."""
    script_file = REPOSITORY / "examples" / "environment.sh"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'source "{script_file}"; {command}'],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path):
    folder = tmp_path / "not" / "yet"
    full = in_environment_script(f'require_free_space "{folder}" 999999999 "the quickstart"')
    assert full.returncode == 1
    assert "the quickstart needs about 999999999 MiB" in full.stderr
    assert in_environment_script(f'require_free_space "{folder}" 1 x').returncode == 0
    assert not folder.exists()


def test_a_machine_without_a_fitting_python_is_told_so(tmp_path):
    result = in_environment_script(f'PATH="{tmp_path}"; find_base_python')
    assert result.returncode == 1
    assert "Python 3.11 or 3.12 is needed" in result.stderr


def test_an_active_environment_of_another_python_is_refused(tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    result = in_environment_script(
        "prepare_environment test", VIRTUAL_ENV=str(tmp_path), REPOSITORY=str(REPOSITORY)
    )
    assert result.returncode == 1
    assert "is not Python 3.11 or 3.12" in result.stderr


def test_a_failed_installation_shows_the_end_of_its_log(tmp_path):
    (tmp_path / "log").write_text("first\nERROR: no such package\n")
    result = in_environment_script(f'install_failed "{tmp_path / "log"}"')
    assert result.returncode == 1
    assert "ERROR: no such package" in result.stderr and "installation failed" in result.stderr
