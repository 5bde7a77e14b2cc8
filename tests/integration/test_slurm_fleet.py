"""Score ranks in Slurm jobs of their own: they join a training job, are cancelled, give way to
another job, and lose their node; training ends at the numbers of a run that nobody disturbed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_kosmosg.checkpoint.folder import CONFIG_FILE
from megatron_kosmosg.config.paths import FAILURE_FILE, METRICS_FILE
from tests.support.digests import newest_checkpoint, parameters_digest
from tests.support.local_slurm import LocalSlurm
from tests.support.preloaded_python import PreloadedPython
from tests.support.ranks import run_ranks
from tests.support.score_runs import program
from tests.support.toy_runs import (
    REPOSITORY,
    arguments_of,
    config_of,
    records,
    train_from_nothing,
    write_data,
)

SCRIPTS = REPOSITORY / "slurm"
ONE_NODE = ("--nodes=1", "--gpus-per-node=2", "--cpus-per-task=1")
HERE = {"cwd": REPOSITORY, "env": {"KOSMOSG_PREFLIGHT": "0"}}
UPDATES = 40
SETTINGS = (
    "score.placement=dedicated",
    f"training.train_iters={UPDATES}",
    f"checkpoint.save_interval={UPDATES}",
    "logging.num_images=0",
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data, and an `align` checkpoint to start from."""
    folder = tmp_path_factory.mktemp("toy")
    write_data(folder, ("caption", "edit", "compositional"))
    short = ("training.train_iters=2", "logging.num_images=0")
    run_ranks(1, train_from_nothing, config_of("align", folder, folder / "align", None, *short))
    return folder


def arguments(world: Path, run: Path) -> list[str]:
    return arguments_of("instruct", world, run, world / "align", *SETTINGS)


def score_job(slurm: LocalSlurm, run: Path, *options: str) -> str:
    # The script asks for a node's whole memory: here two jobs share one.
    where = ("--nodelist=n02", "--mem=1000", f"--output={run.parent}/score-%j.out")
    size, script = (*ONE_NODE, "--ntasks-per-node=1", *where), str(SCRIPTS / "score_ranks.sh")
    return slurm.submit(*size, *options, script, "--", "--run", str(run), **HERE)


def iterations(run: Path) -> int:
    file = run / METRICS_FILE
    return len(file.read_text().splitlines()) if file.exists() else 0


def children(process: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == process:
                yield int(folder.name)
        except OSError:
            continue  # it ended meanwhile


def kill_the_runs_own_score_rank(python: PreloadedPython) -> int:
    """It works in the only program that has started another process: its task's child. Returns the
    task's process."""
    tasks = {child: task for task in children(python.server) for child in children(task)}
    ((score_rank, task),) = tasks.items()
    os.kill(score_rank, signal.SIGKILL)
    return task


def test_training_lives_on_score_jobs_that_are_cancelled_give_way_and_lose_their_node(
    slurm, preloaded_python, world, tmp_path
):
    run, straight = tmp_path / "run", tmp_path / "straight"
    option, config, *settings = arguments(world, run)
    size = (*ONE_NODE, "--nodelist=n01", "--ntasks-per-node=2")
    written, script = f"--output={tmp_path}/train-%j.out", str(SCRIPTS / "instruct_256gpu.sh")
    training = slurm.submit(*size, written, script, option, config, "--", *settings, **HERE)

    def has_printed(*words: str, times: int = 1) -> None:
        def count() -> int:
            output = slurm.output(training)
            return sum(map(output.count, words))

        slurm.wait_until(lambda: count() >= times, f"{times} times {words}", 120)

    # Without score ranks training waits: nothing of what follows comes after its end.
    slurm.wait_until(lambda: iterations(run) > 0 and (run / CONFIG_FILE).exists(), "iterations")
    task = kill_the_runs_own_score_rank(preloaded_python)
    has_printed("no score rank is left: training waits")
    warned, yielding = score_job(slurm, run), score_job(slurm, run, "--partition=spare")
    has_printed("has joined (CPU ", times=2)
    slurm.run("scancel", "--signal=USR1", warned)  # as sbatch --signal does before the time limit
    urgent = slurm.submit("--nodelist=n02", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    has_printed("has left", times=2)
    with ThreadPoolExecutor(1) as beside:
        undisturbed = beside.submit(run_ranks, 2, program, arguments(world, straight))
        for number in (warned, yielding):
            slurm.wait_until(lambda n=number: slurm.job(n)["Restarts"] == "1", "the restart")
        slurm.wait_until(lambda: slurm.job(urgent)["JobState"] == "RUNNING", "the urgent job")
        slurm.run("scancel", urgent)
        has_printed("has joined (CPU ", times=4)
        slurm.run("scancel", warned)
        has_printed("has left", "is gone", times=4)  # TERM, and USR1 while it leaves
        slurm.kill_node("n02")
        has_printed("has left", "is gone", times=5)
        slurm.start_node("n02")
        last = score_job(slurm, run)
        assert iterations(run) < UPDATES
        # `srun --wait` ends a job two minutes after the first of its tasks.
        assert task in children(preloaded_python.server), "a lost score rank's task has not stayed"
        assert [ended.code for ended in undisturbed.result()] == [0, 0]
    output = slurm.finish(training)
    slurm.run("scancel", yielding, last)
    assert "resumed from" not in output and not (run / FAILURE_FILE).exists()
    assert records(run) == records(straight)
    digests = [parameters_digest(newest_checkpoint(folder)) for folder in (run, straight)]
    assert digests[0] == digests[1]
