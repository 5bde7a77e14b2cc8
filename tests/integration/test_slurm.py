"""Training under a real Slurm of fake nodes: stopped, killed and continued; 32 x 8 that answer.

tests/integration/test_slurm_jobs.py has the other scripts.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_kosmosg.checkpoint.folder import latest_valid
from tests.support.local_slurm import LocalSlurm
from tests.support.moment_seeds import moment_seed
from tests.support.preloaded_python import PreloadedPython
from tests.support.ranks import free_port
from tests.support.toy_runs import REPOSITORY, arguments_of, records, write_data

SIZE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
ITERATIONS = 28

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_data(folder, ("text", "caption", "interleaved"))
    return folder


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    """The command line of a run of 4 ranks that lasts some seconds."""
    return arguments_of(
        "pretrain",
        data,
        run,
        None,
        "parallel.tensor_model_parallel_size=2",
        "training.global_batch_size=4",
        "training.micro_batch_size=1",
        f"training.train_iters={ITERATIONS}",
        "checkpoint.save_interval=4",
        "logging.log_interval=1",
        *more,
    )


def submit(slurm: LocalSlurm, line: list[str], run: Path, *options: str, **where) -> str:
    script = str(REPOSITORY / "slurm" / "pretrain_256gpu.sh")
    option, config, *settings = line
    written = f"--output={run}.out"
    return slurm.submit(*SIZE, *options, written, script, option, config, "--", *settings, **where)


def newest(run: Path) -> int:
    """Iteration of the last line of the metrics that is whole; 0 before the first."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max([json.loads(line)["iteration"] for line in lines if line.endswith("}")], default=0)


def reach(slurm: LocalSlurm, number: str, run: Path, iteration: int) -> None:
    """Returns when the job has trained so far."""

    def reached() -> bool:
        state = slurm.job(number)["JobState"]
        assert state not in ("FAILED", "COMPLETED", "CANCELLED"), slurm.output(number)
        return newest(run) >= iteration

    slurm.wait_until(reached, f"iteration {iteration} of job {number}")


def restarted(slurm: LocalSlurm, number: str, times: int) -> None:
    slurm.wait_until(
        lambda: slurm.job(number)["Restarts"] == str(times), f"restart {times} of job {number}"
    )


def a_rank_on(slurm: LocalSlurm, node: str) -> int:
    """Process id of one training task there."""
    for process in slurm.processes(node):
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        if b"megatron_kosmosg.train" in command and b"srun" not in command[0]:
            return process
    raise AssertionError(f"no rank on {node}")


class FourRanks:
    """The same run on ranks that no Slurm started, in the background."""

    def __init__(self, python: PreloadedPython, line: list[str], written: Path) -> None:
        program = [str(python.venv / "bin" / "python"), "-m", "megatron_kosmosg.train", *line]
        place = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._written, self._ranks = written, []
        with written.open("w") as log:
            for rank in range(4):
                rank_variables = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self._ranks.append(
                    subprocess.Popen(
                        program,
                        cwd=REPOSITORY,
                        env={**os.environ, **place, **rank_variables, "OMP_NUM_THREADS": "1"},
                        stdout=log,
                        stderr=log,
                    )
                )

    def wait(self) -> None:
        codes = [rank.wait(timeout=300) for rank in self._ranks]
        assert codes == [0] * 4, self._written.read_text()


def test_a_signal_to_one_rank_and_the_loss_of_a_node_change_no_number(
    slurm, preloaded_python, data, tmp_path
):
    run, straight = tmp_path / "run", tmp_path / "straight"
    elsewhere = {"KOSMOSG_HOME": str(REPOSITORY), "KOSMOSG_PREFLIGHT": "0"}
    number = submit(slurm, arguments(data, run), run, cwd=tmp_path, env=elsewhere)
    reach(slurm, number, run, 3)
    os.kill(a_rank_on(slurm, "n02"), signal.SIGUSR1)
    restarted(slurm, number, 1)
    # Slurm lets a requeued job wait: time for the run to which nothing happens.
    undisturbed = FourRanks(preloaded_python, arguments(data, straight), tmp_path / "straight.out")
    stopped_at = newest(run)
    output = slurm.output(number)
    assert f"asked to stop: state of iteration {stopped_at} is saved" in output
    assert "exit code 85: requeued" in output and stopped_at < ITERATIONS

    reach(slurm, number, run, stopped_at + 5)
    slurm.kill_node("n01")  # with the batch script, srun and two ranks
    slurm.start_node("n01")
    restarted(slurm, number, 2)
    assert newest(run) < ITERATIONS
    output = slurm.finish(number)
    assert output.count("resumed from") == 2 and output.count(f"project {REPOSITORY}") == 3
    assert output.count("tensor 2 x pipeline 1 x data 2") == 3  # the dry run inside the job
    assert output.rstrip().endswith("slurm: done") and not (run / "slurm_starts").exists()

    undisturbed.wait()
    assert newest(straight) == ITERATIONS
    assert records(run) == records(straight)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_node_that_owns_the_run_folder_is_killed_four_times(
    slurm, preloaded_python, data, tmp_path
):
    """With the batch script and two ranks, at moments of chance; the lock it held stays behind."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    rng, kills, longer = random.Random(moment_seed()), 4, "training.train_iters=80"
    elsewhere = {"KOSMOSG_HOME": str(REPOSITORY), "KOSMOSG_PREFLIGHT": "0"}
    number = submit(slurm, arguments(data, run, longer), run, cwd=tmp_path, env=elsewhere)
    for kill in range(1, kills + 1):
        # Past the next save, or three starts without one would end the job.
        reach(slurm, number, run, newest(run) + 5)
        time.sleep(rng.random())
        assert json.loads((run / "owner.json").read_text())["job"] == number
        slurm.kill_node("n01")
        slurm.start_node("n01")
        restarted(slurm, number, kill)
        assert newest(run) < 80, "it was over before the last kill"
    undisturbed = FourRanks(
        preloaded_python, arguments(data, straight, longer), tmp_path / "straight.out"
    )
    said = slurm.finish(number)
    assert said.count("resumed from") == kills and said.rstrip().endswith("slurm: done")
    undisturbed.wait()
    assert records(run) == records(straight)


def test_the_time_limit_saves_and_requeues(slurm, data, tmp_path):
    run = tmp_path / "run"
    endless = ("training.train_iters=1000000", "checkpoint.save_interval=1000000")
    options = ("--time=120", "--signal=USR1@300")
    fit = {"KOSMOSG_GPUS_PER_NODE": "0", "KOSMOSG_FREE_GIB": "0.1"}  # the GPUs are not there
    line = arguments(data, run, *endless)
    number = submit(slurm, line, run, *options, cwd=REPOSITORY, env=fit)
    reach(slurm, number, run, 2)
    hours, minutes, _ = map(int, slurm.job(number)["RunTime"].split(":"))
    limit = f"TimeLimit={60 * hours + minutes + 4}"
    answer = slurm.run("scontrol", "update", f"JobId={number}", limit)
    assert answer.returncode == 0, answer.stderr
    restarted(slurm, number, 1)
    slurm.run("scancel", number)
    output = slurm.finish(number, "CANCELLED")
    assert latest_valid(run / "checkpoints").name == f"iter_{newest(run):07d}"
    assert "exit code 85: requeued" in output
    assert "all-reduce inside a node" in output and "all-reduce over all 4 ranks" in output


def test_a_crash_at_every_start_ends_the_job(slurm, data, tmp_path):
    """A rank dies before the first checkpoint: no error that is known to come again."""
    run = tmp_path / "run"
    once = {"KOSMOSG_MAX_STALLED_STARTS": "1", "KOSMOSG_PREFLIGHT": "0"}
    line = arguments(data, run, "checkpoint.save_interval=1000000")
    number = submit(slurm, line, run, cwd=REPOSITORY, env=once)
    for restarts in (0, 1):
        restarted(slurm, number, restarts)
        reach(slurm, number, run, 1)
        (run / "metrics.jsonl").unlink()
        os.kill(a_rank_on(slurm, "n02"), signal.SIGKILL)
    output = slurm.finish(number, "FAILED")
    assert output.count("start 0 of job") == output.count("start 1 of job") == 1
    assert "stopped: 1 restarts in a row brought no new checkpoint after iteration 0" in output


def test_the_shape_of_256_gpus_is_accepted_and_its_dry_run_done(
    preloaded_python, tmp_path_factory, tmp_path
):
    folder = tmp_path_factory.mktemp("w")
    with LocalSlurm(folder, num_nodes=32) as wide:
        wide.environment["VIRTUAL_ENV"] = str(preloaded_python.venv)
        script = str(REPOSITORY / "slurm" / "instruct_256gpu.sh")
        log = f"--output={tmp_path}/x.out"
        number = wide.submit(log, script, "--check", cwd=REPOSITORY)
        output = wide.finish(number)
        assert int(wide.job(number)["NumNodes"]) == 32
    assert "Ranks (256)" in output and "1024 samples an update" in output
    assert "256 tasks on 32 nodes, ranks in block order, 8 GPUs visible to each" in output
