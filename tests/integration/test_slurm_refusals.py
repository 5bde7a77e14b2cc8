"""What the job scripts refuse under a real Slurm, and when they give up.

tests/integration/test_slurm.py has the run that is stopped, killed and continued.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.local_slurm import LocalSlurm
from tests.support.toy_runs import REPOSITORY, arguments_of, write_data

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
    **environment,
) -> str:
    """A job of one task that would train for ever. more: settings."""
    endless = ("training.train_iters=1000000", "checkpoint.save_interval=1000000")
    alone = ("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false", *endless)
    option, config, *settings = arguments_of("pretrain", data, run, None, *alone, *more)
    script = str(REPOSITORY / "slurm" / "pretrain_256gpu.sh")
    line = (*SIZE, *options, f"--output={run.parent}/%j.out", script, option, config)
    return slurm.submit(*line, "--", *settings, cwd=REPOSITORY, env=environment)


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
    """The job that has the folder was submitted with an environment of its own and no other."""
    at_once = {"KOSMOSG_WARN_SECONDS": "600", "KOSMOSG_PREFLIGHT": "0"}
    hurried = submit(slurm, data, tmp_path / "hurried", "--time=2", **at_once)
    run, own = tmp_path / "run", "--export=VIRTUAL_ENV,KOSMOSG_PREFLIGHT"
    first = submit(slurm, data, run, own, KOSMOSG_PREFLIGHT="0")
    metrics = run / "metrics.jsonl"

    def has_trained() -> bool:
        assert slurm.job(first)["JobState"] in ("PENDING", "RUNNING"), slurm.output(first)
        return metrics.exists() and metrics.read_text() != ""

    slurm.wait_until(has_trained, f"an update of job {first}", 120)
    node = slurm.job(first)["NodeList"]
    assert b"CUDA_DEVICE_MAX_CONNECTIONS=1" in environment_of_a_rank(slurm, node)

    second = submit(slurm, data, run, KOSMOSG_PREFLIGHT="0")
    said = slurm.finish(second, "FAILED")
    assert f"Slurm job {first}, process" in said and "not requeued" in said
    before = len(metrics.read_text().splitlines())
    slurm.wait_until(
        lambda: len(metrics.read_text().splitlines()) > before, f"more updates of job {first}"
    )
    assert json.loads((run / "owner.json").read_text())["job"] == first
    slurm.run("scancel", first)
    slurm.finish(first, "CANCELLED")

    said = slurm.finish(hurried, "FAILED")
    assert said.count(": requeued") == 2, said
    assert "3 starts in a row were told to stop before they had saved one iteration" in said


def test_all_missing_files_end_a_job_before_its_nodes_are_looked_at(slurm, data, tmp_path):
    absent = ("data.blend.text.path=/nowhere/text", "data.tokenizer_model=/nowhere/model")
    number = submit(slurm, data, tmp_path / "run", more=absent)
    said = slurm.finish(number, "FAILED")
    assert "error: 2 inputs are missing:" in said
    assert "data.tokenizer_model=/nowhere/model: no such file" in said
    assert "/nowhere/text.bin does not exist" in said
    assert "start 0 of job" not in said and not (tmp_path / "run").exists()
