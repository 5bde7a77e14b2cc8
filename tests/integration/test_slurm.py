"""The job scripts on a real Slurm of fake nodes: 2 x 2 tasks that train, 32 x 8 that answer."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.data.preprocess.run import PreprocessJob, preprocess
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.files import World, write_world
from megatron_kosmosg.train import run as run_training
from megatron_kosmosg.training.checkpoint_folder import latest_valid
from tests.local_slurm import LocalSlurm
from tests.preloaded_python import PreloadedPython
from tests.ranks import run_ranks

REPOSITORY = Path(__file__).parents[2]
PRETRAIN = str(REPOSITORY / "slurm" / "pretrain_256gpu.sh")
SIZE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
ITERATIONS = 40
KINDS = ("text", "caption", "interleaved")

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """What the jobs run as Python."""
    with PreloadedPython(tmp_path_factory.mktemp("p")) as preloaded:
        yield preloaded


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, python):
    with LocalSlurm(tmp_path_factory.mktemp("s"), num_nodes=2) as cluster:
        cluster.environment["VIRTUAL_ENV"] = str(python.venv)
        cluster.environment.pop("KOSMOSG_HOME", None)
        yield cluster


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """Overrides that make debug_pretrain a run of 4 ranks on a small world."""
    folder = tmp_path_factory.mktemp("toy")
    write_world(folder / "world", World(24, 0), lambda done, total: None)
    tokenizer = assets.path() / "sentencepiece.model"
    paths = []
    for split, section in (("train", "blend"), ("heldout", "heldout")):
        for kind in KINDS:
            source, prefix = folder / "world" / split / f"{kind}.jsonl", folder / split / kind
            preprocess(PreprocessJob(kind, (str(source),), str(tokenizer), str(prefix)), _quietly)
            paths.append(f"data.{section}.{kind}.path={prefix}")
    return [
        *paths,
        "parallel.tensor_model_parallel_size=2",
        "training.global_batch_size=4",
        "training.micro_batch_size=1",
        f"training.train_iters={ITERATIONS}",
        "checkpoint.save_interval=4",
        "logging.tensorboard=false",
    ]


def _quietly(*_: object) -> None:
    return None


def submit(slurm: LocalSlurm, run: Path, settings: list[str], *options: str, **where) -> str:
    return slurm.submit(
        *SIZE,
        *options,
        f"--output={run}.out",
        PRETRAIN,
        "--config",
        "examples/configs/debug_pretrain.yaml",
        "--",
        *settings,
        f"logging.output_dir={run}",
        **where,
    )


def records(run: Path) -> list[tuple]:
    """What the metrics say of the numbers that are learnt."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    names = ("iteration", "loss", "grad_norm", "heldout_loss")
    return [tuple(line.get(name) for name in names) for line in whole]


def wait_for_iteration(slurm: LocalSlurm, number: str, run: Path, iteration: int) -> None:
    def reached() -> bool:
        state = slurm.job(number)["JobState"]
        assert state not in ("FAILED", "COMPLETED", "CANCELLED"), Path(f"{run}.out").read_text()
        return any(record[0] >= iteration for record in records(run))

    slurm.wait_until(reached, f"iteration {iteration} of job {number}")


def a_rank_on(slurm: LocalSlurm, node: str) -> int:
    """Process id of one training task there."""
    for process in slurm.processes(node):
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        if b"megatron_kosmosg.train" in command and b"srun" not in command[0]:
            return process
    raise AssertionError(f"no rank on {node}")


def train(settings: list[str]) -> None:
    """The same run on ranks that no Slurm started."""
    os.chdir(REPOSITORY)
    assert run_training(load_config("examples/configs/debug_pretrain.yaml", settings)) == 0


def test_a_signal_to_one_rank_and_the_loss_of_a_node_change_no_number(slurm, settings, tmp_path):
    run = tmp_path / "run"
    elsewhere = {"KOSMOSG_HOME": str(REPOSITORY), "KOSMOSG_PREFLIGHT": "0"}
    number = submit(slurm, run, settings, cwd=tmp_path, env=elsewhere)
    wait_for_iteration(slurm, number, run, 3)
    os.kill(a_rank_on(slurm, "n02"), signal.SIGUSR1)
    slurm.wait_until(lambda: slurm.job(number)["Restarts"] == "1", "the first restart")
    stopped_at = records(run)[-1][0]
    said = Path(f"{run}.out").read_text()
    assert f"asked to stop: state of iteration {stopped_at} is saved" in said
    assert "exit code 85: requeued" in said and stopped_at < ITERATIONS

    wait_for_iteration(slurm, number, run, stopped_at + 5)
    slurm.kill_node("n01")  # with the batch script, srun and two ranks
    slurm.start_node("n01")
    slurm.wait_until(lambda: slurm.job(number)["Restarts"] == "2", "the second restart")
    assert records(run)[-1][0] < ITERATIONS
    assert slurm.wait_for_end(number) == "COMPLETED", Path(f"{run}.out").read_text()
    said = Path(f"{run}.out").read_text()
    assert said.count("resumed from") == 2 and said.count(f"project {REPOSITORY}") == 3
    assert said.count("tensor 2 x pipeline 1 x data 2") == 3  # the dry run inside the job
    assert said.rstrip().endswith("slurm: done") and not (run / "slurm_starts").exists()

    straight = tmp_path / "straight"
    run_ranks(4, train, [*settings, f"logging.output_dir={straight}"], timeout=1200)
    assert [record[0] for record in records(straight)][-1] == ITERATIONS
    assert records(run) == records(straight)


def test_the_time_limit_saves_and_requeues(slurm, settings, tmp_path):
    run = tmp_path / "run"
    endless = [*settings, "training.train_iters=1000000", "checkpoint.save_interval=1000000"]
    options = ("--time=120", "--signal=USR1@300")
    fit = {"KOSMOSG_GPUS_PER_NODE": "0", "KOSMOSG_FREE_GIB": "0.1"}  # the GPUs are not there
    number = submit(slurm, run, endless, *options, cwd=REPOSITORY, env=fit)
    wait_for_iteration(slurm, number, run, 2)
    hours, minutes, _ = map(int, slurm.job(number)["RunTime"].split(":"))
    answer = slurm.run(
        "scontrol", "update", f"JobId={number}", f"TimeLimit={60 * hours + minutes + 4}"
    )
    assert answer.returncode == 0, answer.stderr
    slurm.wait_until(lambda: slurm.job(number)["Restarts"] == "1", "the restart")
    slurm.run("scancel", number)
    assert slurm.wait_for_end(number) == "CANCELLED"
    assert latest_valid(run / "checkpoints").name == f"iter_{records(run)[-1][0]:07d}"
    said = Path(f"{run}.out").read_text()
    assert "exit code 85: requeued" in said
    assert "all-reduce inside a node" in said and "all-reduce over all 4 ranks" in said


def test_preprocessing_under_mpi_writes_the_bytes_of_one_process(slurm, settings, tmp_path):
    alone = Path(settings[0].removeprefix("data.blend.text.path="))
    source, prefix = alone.parents[1] / "world" / "train" / "text.jsonl", tmp_path / "text"
    tool = ["--kind", "text", "--input", source, "--output-prefix", prefix, "--tokenizer-model"]
    script = REPOSITORY / "slurm" / "preprocess_mpi.sh"
    sizes = ("--nodes=2", "--ntasks-per-node=2", f"--output={tmp_path}/x.out")
    arguments = [*map(str, tool), str(assets.path() / "sentencepiece.model")]
    # A Python of its own: MPI is met through a file that srun leaves open. It imports no torch.
    plain = {"VIRTUAL_ENV": sys.prefix}
    number = slurm.submit(*sizes, str(script), "--", *arguments, cwd=REPOSITORY, env=plain)
    said = tmp_path / "x.out"
    assert slurm.wait_for_end(number) == "COMPLETED", said.read_text()
    for suffix in (".bin", ".idx"):
        ours, theirs = Path(f"{prefix}{suffix}"), Path(f"{alone}{suffix}")
        assert ours.read_bytes() == theirs.read_bytes()


def test_arrays_and_jobs_that_wait_for_others(slurm, tmp_path):
    script = str(REPOSITORY / "slurm" / "evaluate.sh")
    options = (*SIZE, f"--output={tmp_path}/%a.out", "--array=0-1")
    first = slurm.submit(*options, script, "--check", cwd=REPOSITORY)
    after = f"--dependency=afterok:{first}"
    second = slurm.submit(
        *SIZE, after, f"--output={tmp_path}/after.out", script, "--check", cwd=REPOSITORY
    )
    assert slurm.wait_for_end(second, 120) == "COMPLETED"
    for name in ("0", "1", "after"):
        said = (tmp_path / f"{name}.out").read_text()
        assert "4 tasks on 2 nodes, ranks in block order, 2 GPUs visible to each" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--partition=nowhere"], ["choose a partition", "main (2 nodes"]),
        (["--nodes=1", "--partition=lab", "--account=nobody"], ["choose an account"]),
        (["--nodes=64"], ["the cluster cannot give this", "2 nodes of 64 CPUs"]),
        (["--nodes=2", "--gpus-per-node=16"], ["the cluster cannot give this", "gpu:8"]),
    ],
    ids=["partition", "account", "nodes", "gpus"],
)
def test_what_slurm_refuses_is_explained_before_it_is_submitted(slurm, options, words):
    script = str(REPOSITORY / "slurm" / "preprocess_mpi.sh")
    answer = slurm.run("bash", script, "--check", *options)
    assert answer.returncode == 2
    assert all(word in answer.stderr for word in words), answer.stderr


def test_the_project_not_found_is_said(slurm, tmp_path):
    script = str(REPOSITORY / "slurm" / "evaluate.sh")
    number = slurm.submit(*SIZE, f"--output={tmp_path}/x.out", script, "--check", cwd=tmp_path)
    assert slurm.wait_for_end(number, 120) == "FAILED"
    assert "export KOSMOSG_HOME=" in (tmp_path / "x.out").read_text()


def test_the_shape_of_256_gpus_is_accepted_and_its_dry_run_done(python, tmp_path_factory, tmp_path):
    folder = tmp_path_factory.mktemp("w")
    with LocalSlurm(folder, num_nodes=32) as wide:
        wide.environment["VIRTUAL_ENV"] = str(python.venv)
        script = str(REPOSITORY / "slurm" / "instruct_256gpu.sh")
        output = f"--output={tmp_path}/x.out"
        number = wide.submit(output, script, "--check", cwd=REPOSITORY)
        assert wide.wait_for_end(number) == "COMPLETED", (tmp_path / "x.out").read_text()
        assert int(wide.job(number)["NumNodes"]) == 32
    said = (tmp_path / "x.out").read_text()
    assert "Ranks (256)" in said and "1024 samples an update" in said
    assert "256 tasks on 32 nodes, ranks in block order, 8 GPUs visible to each" in said
