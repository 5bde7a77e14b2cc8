"""The other job scripts on a real Slurm: three stages in a row, tools, arrays, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_kosmosg.cli import evaluate_dreambench
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.stand_in_networks import write_clip
from tests.support.evaluated_images import write_dreambooth
from tests.support.local_slurm import LocalSlurm
from tests.support.toy_runs import REPOSITORY, arguments_of, write_data

SCRIPTS = REPOSITORY / "slurm"
SIZE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
STAGES = ("pretrain", "align", "instruct")
DEDICATED = (
    "score.placement=dedicated",
    "score.ranks_per_replica=2",
    "parallel.tensor_model_parallel_size=2",
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_data(folder)
    return folder


def updates(run: Path) -> list[dict]:
    """The lines of the metrics that are of updates."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


def dreambench_arguments(folder: Path) -> list[str]:
    """Of one image of each subject, scored by a stand-in."""
    folder.mkdir()
    images, clip = write_dreambooth(folder / "dreambooth"), write_clip(folder / "clip")
    files = ["--dreambooth", str(images), "--clip", str(clip)]
    return [*files, "--num-prompts", "1", "--num-images", "1", "--steps", "1"]


def submit(slurm: LocalSlurm, name: str, folder: Path, *arguments: str, **more) -> str:
    """more: `after`, numbers of jobs that have to end well first; settings of LocalSlurm.run."""
    before = more.pop("after", ())
    options = () if name == "evaluate" else SIZE
    if before:
        options += (f"--dependency=afterok:{':'.join(before)}",)
    written = f"--output={folder}/{name}-%j.out"
    return slurm.submit(*options, written, str(SCRIPTS / f"{name}.sh"), *arguments, **more)


def test_three_stages_and_an_evaluation_each_after_the_one_before(slurm, data, tmp_path):
    """Latents are cached meanwhile, larger ones in a job that is interrupted, long enough for it;
    instruct has score ranks."""
    here = {"cwd": REPOSITORY, "env": {"KOSMOSG_PREFLIGHT": "0"}}
    frozen = str(assets.path() / "stable-diffusion")
    kinds = ("compositional", "edit", "caption")
    prefixes = [str(data / "data" / "train" / kind) for kind in kinds]
    options = ("--stable-diffusion", frozen, "--threads", "1", "--image-size")
    tool = (*prefixes, *options, "32")
    caching = submit(slurm, "cache_latents", tmp_path, "--", *tool, **here)
    tool = (prefixes[0], *options, "512", "--batch-size", "1", "--name", "large")
    large = submit(slurm, "cache_latents", tmp_path, "--", *tool, **here)
    jobs, previous = [], None
    for stage in STAGES:
        more = ["training.train_iters=2", "logging.num_images=0"]
        if stage == "instruct":
            more += [*DEDICATED, "data.latent_cache=latents"]
        option, config, *settings = arguments_of(stage, data, tmp_path / stage, previous, *more)
        before = jobs[-1:] + [caching] * (stage == "instruct")
        line = (option, config, "--", *settings)
        jobs.append(submit(slurm, f"{stage}_256gpu", tmp_path, *line, after=before, **here))
        previous = tmp_path / stage
    judged = tmp_path / "evaluation"
    tool = ("--run", f"instruct={previous}", "--output", str(judged), "--fast", "--count", "2")
    arguments = ("--", *tool, "--steps", "1")
    trained = jobs[-1:]
    jobs.append(submit(slurm, "evaluate", tmp_path, *arguments, after=trained, **here))
    over_nodes = ("--nodes=2", f"--dependency=afterok:{trained[0]}")
    bench = ["--model", str(previous), *dreambench_arguments(tmp_path / "bench")]
    written = f"--output={tmp_path}/bench.out"
    script, *tool = str(SCRIPTS / "evaluate.sh"), "dreambench", "--", *bench
    line = (*over_nodes, written, script, *tool, "--output", str(tmp_path / "judged"))
    scoring = slurm.submit(*line, **here)

    def is_interrupted() -> bool:
        slurm.run("scancel", "--signal=USR1", large)
        return slurm.job(large)["Restarts"] == "1"

    slurm.wait_until(is_interrupted, f"the restart of job {large}")
    output = slurm.finish(large)
    assert "exit code 138: requeued" in output and f"{prefixes[0]}.large: complete" in output
    output = slurm.finish(caching)
    assert all(f"{prefix}.latents: complete" in output for prefix in prefixes), output
    _, _, output, _ = (slurm.finish(number) for number in jobs)
    assert "tensor 2 x pipeline 1 x data 1 + 2 score of each replica" in output
    assert "replica 0: ranks 0, 1 -> score ranks 2, 3" in output and "slurm: done" in output
    for stage in STAGES:
        assert [line["iteration"] for line in updates(tmp_path / stage)] == [1, 2]
    assert all(0 < line["score_idle"] <= 1 for line in updates(tmp_path / "instruct"))
    assert json.loads((judged / "metrics.json").read_text())["rows"]
    output = slurm.finish(scoring)
    assert "2 tasks of tools/evaluate_dreambench.py" in output
    assert all(f"rank {rank}: 15 drawn, 0 kept" in output for rank in (0, 1)), output
    assert evaluate_dreambench.main([*bench, "--output", str(tmp_path / "alone")]) == 0
    alone, over_two = (tmp_path / name / "result.json" for name in ("alone", "judged"))
    assert over_two.read_bytes() == alone.read_bytes()


def test_preprocessing_under_mpi_writes_the_bytes_of_one_process(slurm, data, tmp_path):
    alone, prefix = data / "data" / "train" / "text", tmp_path / "text"
    source = data / "world" / "train" / "text.jsonl"
    model = assets.path() / "sentencepiece.model"
    tool = ["--kind", "text", "--input", source, "--output-prefix", prefix, "--tokenizer-model"]
    # A Python of its own: MPI is met through a file that srun leaves open. It imports no torch.
    plain = {"VIRTUAL_ENV": sys.prefix}
    arguments = ["--", *map(str, tool), str(model)]
    number = submit(slurm, "preprocess_mpi", tmp_path, *arguments, cwd=REPOSITORY, env=plain)
    slurm.finish(number)
    for suffix in (".bin", ".idx"):
        of_job, of_one_process = Path(f"{prefix}{suffix}"), Path(f"{alone}{suffix}")
        assert of_job.read_bytes() == of_one_process.read_bytes()


def test_a_sweep_is_an_array_and_a_job_after_it_waits_for_all_of_it(slurm, tmp_path):
    """Submitted from a folder inside the project."""
    rates = ("1.5e-4", "2.5e-4")
    sweep = tmp_path / "sweep"
    sweep.write_text("".join(f"optimizer.lr={rate}\n" for rate in rates))
    script, written = str(SCRIPTS / "align_256gpu.sh"), f"--output={tmp_path}/%a.out"
    arguments = ("--check", "--sweep", str(sweep), "--", "training.global_batch_size=4")
    small = (*arguments, "training.micro_batch_size=1", "parallel.tensor_model_parallel_size=1")
    first = slurm.submit(*SIZE, "--array=1-2%1", written, script, *small, cwd=SCRIPTS)
    second = submit(slurm, "evaluate", tmp_path, "--check", after=[first], cwd=SCRIPTS)
    output = slurm.finish(second)
    assert "1 tasks on 1 nodes, ranks in block order, 1 GPUs visible to each" in output
    for task, rate in enumerate(rates, start=1):
        output = (tmp_path / f"{task}.out").read_text()
        assert f"\n  lr: {float(rate)}\n" in output, output
        assert "4 tasks on 2 nodes, ranks in block order, 2 GPUs visible to each" in output


def test_a_job_after_one_that_failed_does_not_start(slurm, tmp_path):
    failing = submit(slurm, "align_256gpu", tmp_path, "--", "no.such=setting", cwd=REPOSITORY)
    waiting = submit(slurm, "evaluate", tmp_path, "--check", after=[failing], cwd=REPOSITORY)
    assert "no.such" in slurm.finish(failing, "FAILED")
    slurm.wait_until(
        lambda: slurm.job(waiting)["Reason"] == "DependencyNeverSatisfied", "the reason"
    )
    slurm.run("scancel", waiting)


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
    answer = slurm.run("bash", str(SCRIPTS / "preprocess_mpi.sh"), "--check", *options)
    assert answer.returncode == 2
    assert all(word in answer.stderr for word in words), answer.stderr


def test_the_project_not_found_is_said(slurm, tmp_path):
    number = submit(slurm, "evaluate", tmp_path, "--check", cwd=tmp_path)
    assert "export KOSMOSG_HOME=" in slurm.finish(number, "FAILED")
