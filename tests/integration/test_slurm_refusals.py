"""What the job scripts refuse under a real Slurm, and when they give up.

tests/integration/test_slurm.py has the run that is stopped, killed and continued.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.support.local_slurm import LocalSlurm
from tests.support.toy_runs import REPOSITORY, arguments_of, write_data

ALONE = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "training.train_iters=1000000",
    "checkpoint.save_interval=1000000",
)
SIZE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_data(folder, ("text", "caption", "interleaved"))
    return folder


def submit(
    slurm: LocalSlurm,
    data: Path,
    run: Path,
    *options: str,
    more: tuple[str, ...] = (),
    script: Path = REPOSITORY / "slurm" / "pretrain_256gpu.sh",
    **environment,
) -> str:
    """A job of one task that would train for ever, submitted where `script` finds the project.
    more: settings."""
    option, config, *settings = arguments_of("pretrain", data, run, None, *ALONE, *more)
    line = (*SIZE, *options, f"--output={run.parent}/%j.out", str(script), option, config)
    project = script.parent.parent if script.parent.name == "slurm" else script.parent
    return slurm.submit(*line, "--", *settings, cwd=project, env=environment)


def goes_on(slurm: LocalSlurm, metrics: Path) -> None:
    """Returns after more updates of the run."""
    before = len(metrics.read_text().splitlines())
    slurm.wait_until(lambda: len(metrics.read_text().splitlines()) > before, "more updates")


def environment_of_a_rank(slurm: LocalSlurm, node: str) -> list[bytes]:
    for process in slurm.processes(node):
        folder = Path(f"/proc/{process}")
        command = (folder / "cmdline").read_bytes().split(b"\0")
        if b"megatron_kosmosg.train" in command and b"srun" not in command[0]:
            return (folder / "environ").read_bytes().split(b"\0")
    raise AssertionError(f"no rank on {node}")


def test_a_folder_has_one_job_and_a_limit_without_time_for_a_start_is_given_up(
    slurm, data, tmp_path
):
    """The job that has the folder was submitted with nothing of the environment, by a script of
    one's own that calls the project's."""
    at_once = {"KOSMOSG_WARN_SECONDS": "600", "KOSMOSG_PREFLIGHT": "0"}
    hurried = submit(slurm, data, tmp_path / "hurried", "--time=2", **at_once)
    run, project = tmp_path / "run", tmp_path / "project"
    project.mkdir()
    for name in ("slurm", "examples", "tools", "megatron_kosmosg"):
        (project / name).symlink_to(REPOSITORY / name)
    (project / ".venv").symlink_to(slurm.environment["VIRTUAL_ENV"])
    script = project / "own.sh"
    script.write_text(
        '#!/bin/bash\nexport KOSMOSG_PREFLIGHT=0\nexec bash slurm/pretrain_256gpu.sh "$@"\n'
    )
    first = submit(slurm, data, run, "--export=NONE", script=script)
    metrics = run / "metrics.jsonl"

    def has_trained() -> bool:
        assert slurm.job(first)["JobState"] in ("PENDING", "RUNNING"), slurm.output(first)
        return metrics.exists() and metrics.read_text() != ""

    slurm.wait_until(has_trained, f"an update of job {first}", 120)
    node = slurm.job(first)["NodeList"]
    assert b"CUDA_DEVICE_MAX_CONNECTIONS=1" in environment_of_a_rank(slurm, node)

    second = submit(slurm, data, run, KOSMOSG_PREFLIGHT="0")
    output = slurm.finish(second, "FAILED")
    assert f"Slurm job {first}, process" in output and "not requeued" in output
    goes_on(slurm, metrics)
    assert json.loads((run / "owner.json").read_text())["job"] == first
    slurm.run("scancel", first)
    slurm.finish(first, "CANCELLED")

    output = slurm.finish(hurried, "FAILED")
    assert output.count(": requeued") == 2, output
    assert "3 starts in a row were told to stop before they had saved one iteration" in output


def test_all_missing_files_end_a_job_before_its_nodes_are_looked_at(slurm, data, tmp_path):
    absent = ("data.blend.text.path=/nowhere/text", "data.tokenizer_model=/nowhere/model")
    number = submit(slurm, data, tmp_path / "run", more=absent)
    output = slurm.finish(number, "FAILED")
    assert "error: 2 inputs are missing:" in output
    assert "data.tokenizer_model=/nowhere/model: no such file" in output
    assert "/nowhere/text.bin does not exist" in output
    assert "start 0 of job" not in output and not (tmp_path / "run").exists()


REFUSED = "belongs to a run that is alive: Slurm job"


def test_of_an_array_without_a_sweep_one_task_trains(slurm, data, tmp_path):
    run = tmp_path / "run"
    number = submit(slurm, data, run, "--array=1-2", KOSMOSG_PREFLIGHT="0")
    slurm.wait_until(lambda: "not requeued" in slurm.output(number), "the end of one task", 120)
    assert slurm.output(number).count(REFUSED) == 1
    running = slurm.run("squeue", "--noheader", "-r", "-j", number, "-t", "R", "-o", "%A")
    assert [json.loads((run / "owner.json").read_text())["job"]] == running.stdout.split()
    slurm.wait_until((run / "metrics.jsonl").exists, "an update", 120)
    goes_on(slurm, run / "metrics.jsonl")
    slurm.run("scancel", number)


def test_of_two_torchruns_under_one_srun_one_trains(slurm, data, tmp_path):
    """Both are rank 0 of a world of one, of the same start of the same job."""
    run, python = tmp_path / "run", slurm.environment["VIRTUAL_ENV"] + "/bin/python"
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    program = ["--no-python", python, "-m", "megatron_kosmosg.train"]
    settings = arguments_of("pretrain", data, run, None, *ALONE)
    command = ["srun", "--ntasks=2", "--kill-on-bad-exit=0", *torchrun, *program, *settings]
    size = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1")
    written = f"--output={tmp_path}/%j.out"
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    number = slurm.submit(*size, written, "--wrap", shlex.join(command), env=environment)
    slurm.wait_until(lambda: "ChildFailedError" in slurm.output(number), "the end of one", 120)
    assert slurm.output(number).count(f"{REFUSED} {number}, process") == 1
    slurm.wait_until((run / "metrics.jsonl").exists, "an update", 120)
    goes_on(slurm, run / "metrics.jsonl")
    slurm.run("scancel", number)
    slurm.finish(number, "CANCELLED")
