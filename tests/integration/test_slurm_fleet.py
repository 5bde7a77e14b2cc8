"""Score ranks in Slurm jobs of their own: they join a training job, are cancelled and requeued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.local_slurm import LocalSlurm
from tests.support.ranks import run_ranks
from tests.support.toy_runs import (
    REPOSITORY,
    arguments_of,
    config_of,
    train_from_nothing,
    write_data,
)

SCRIPTS = REPOSITORY / "slurm"
ONE_NODE = ("--nodes=1", "--gpus-per-node=2", "--cpus-per-task=1")
HERE = {"cwd": REPOSITORY, "env": {"KOSMOSG_PREFLIGHT": "0"}}

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data, and an `align` checkpoint to start from."""
    folder = tmp_path_factory.mktemp("toy")
    write_data(folder, ("caption", "edit", "compositional"))
    short = ("training.train_iters=2", "logging.num_images=0")
    run_ranks(1, train_from_nothing, config_of("align", folder, folder / "align", None, *short))
    return folder


def score_job(slurm: LocalSlurm, run: Path, folder: Path) -> str:
    # The script asks for a node's whole memory: here two jobs share one.
    size = (*ONE_NODE, "--ntasks-per-node=1", "--mem=1000", f"--output={folder}/score-%j.out")
    return slurm.submit(*size, str(SCRIPTS / "score_ranks.sh"), "--", "--run", str(run), **HERE)


def iterations(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_score_jobs_join_a_training_job_and_are_cancelled_and_requeued(slurm, world, tmp_path):
    run = tmp_path / "run"
    more = ("score.placement=dedicated", "training.train_iters=100000", "logging.num_images=0")
    option, config, *settings = arguments_of("instruct", world, run, world / "align", *more)
    size = (*ONE_NODE, "--ntasks-per-node=2", f"--output={tmp_path}/train-%j.out")
    script = str(SCRIPTS / "instruct_256gpu.sh")
    training = slurm.submit(*size, script, option, config, "--", *settings, **HERE)
    slurm.wait_until(lambda: iterations(run) > 1, "the first iterations")

    def has_said(words: str, times: int = 1) -> None:
        slurm.wait_until(lambda: slurm.output(training).count(words) >= times, words, 120)

    first, second = (score_job(slurm, run, tmp_path) for _ in range(2))
    has_said("has joined (CPU)", 2)
    slurm.run("scancel", first)
    has_said("; 2 left")
    at = iterations(run)
    slurm.wait_until(lambda: iterations(run) > at + 2, "iterations without the cancelled job")

    slurm.run("scancel", "--signal=USR1", second)  # as sbatch --signal does before the time limit
    has_said("has left; 1 left")
    slurm.wait_until(lambda: slurm.job(second)["Restarts"] == "1", f"the restart of job {second}")
    has_said("has joined (CPU)", 3)
    at = iterations(run)
    slurm.wait_until(lambda: iterations(run) > at + 2, "iterations with the requeued job")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line["score_ranks"] for line in lines if "score_ranks" in line) == 3
    assert not (run / "failure.txt").exists()
    slurm.run("scancel", second, training)
    slurm.finish(training, "CANCELLED")
