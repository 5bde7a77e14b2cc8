"""A killed run goes on and ends with the bytes of one that was not; so does a run under MPI."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_kosmosg.preprocess import input_files, join, preprocess_run
from megatron_kosmosg.preprocess.mpi_workers import choose_workers
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from megatron_kosmosg.preprocess.work_folder import WorkFolder
from tests.support.data_helpers import image_records, text_records, write_jsonl, write_tokenizer

REPOSITORY = Path(__file__).parents[2]
TOOL = str(REPOSITORY / "tools" / "preprocess_data.py")
OUTPUTS = (".bin", ".idx", ".json", ".sentences.npy", ".sentence_offsets.npy", ".rejects.jsonl")
MPIRUN = Path(sys.executable).with_name("mpirun")


class Killed(BaseException):
    """Stands for the end of the process at this very place."""


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{end}").read_bytes() for end in OUTPUTS]


def quiet(job: PreprocessJob) -> None:
    preprocess(job, lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 JSONL files of 101 records (one of them bad), a file of captions, and a tokenizer."""
    folder = tmp_path_factory.mktemp("resume")
    write_tokenizer(folder)
    for i in range(40):
        write_jsonl(folder / "text" / f"{i:02d}.jsonl", [*text_records(100, i), {"text": i}])
    records = image_records(folder, "caption", 24)
    records[7]["key"] = records[3]["key"]
    write_jsonl(folder / "captions.jsonl", records)
    return folder


def tool_arguments(folder: Path, prefix: Path) -> list[str]:
    return [
        *(sys.executable, TOOL, "--kind", "text", "--input", str(folder / "text" / "*.jsonl")),
        *("--tokenizer-model", str(folder / "spm.model"), "--output-prefix", str(prefix)),
    ]


def environment(**more: str) -> dict[str, str]:
    # The tests may themselves run under a launcher.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "SLURM", "OMPI"))}
    return inherited | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def uninterrupted(folder) -> list[bytes]:
    prefix = folder / "whole"
    inputs_ = (str(folder / "text" / "*.jsonl"),)
    quiet(PreprocessJob("text", inputs_, str(folder / "spm.model"), str(prefix)))
    return contents(prefix)


def test_a_run_killed_and_interrupted_ends_with_the_same_bytes(folder, uninterrupted, tmp_path):
    prefix = tmp_path / "out"
    arguments = [*tool_arguments(folder, prefix), "--workers", "2", "--resume"]
    partial = tmp_path / ".out.partial"

    def num_done() -> int:
        return len(list(partial.glob("*.counts.json")))

    for new_shards, how in ((3, signal.SIGKILL), (3, signal.SIGINT)):
        # Counted from here: what a killed run's workers still ended would otherwise let the next
        # one be stopped before Python itself has started, which Python answers with code 1.
        before = num_done()
        process = subprocess.Popen(
            arguments,
            env=environment(),
            start_new_session=True,
            stderr=subprocess.PIPE,
            # Tests started in the background of a shell ignore Ctrl-C, and so would the tool.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 120
        while num_done() < before + new_shards and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if how == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, how)  # Ctrl-C reaches the workers, too
        _, output = process.communicate(timeout=120)
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert b"interrupted; --resume goes on" in output and b"Traceback" not in output
        # The workers notice that their parent is gone: nobody writes behind the next run.
        while _session_lives(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not Path(f"{prefix}.json").exists() or not partial.exists()
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(prefix) == uninterrupted
    assert not partial.exists()


def _session_lives(session: int) -> bool:
    listed = subprocess.run(
        ["ps", "-o", "stat=", "-s", str(session)], capture_output=True, text=True
    )
    return any(not line.startswith("Z") for line in listed.stdout.split())


def caption_job(folder: Path, prefix: Path) -> PreprocessJob:
    source, model = str(folder / "captions.jsonl"), str(folder / "spm.model")
    return PreprocessJob("caption", (source,), model, str(prefix), resume=True)


STEPS = [
    (preprocess_run, "copy_shard", 0),
    (preprocess_run, "copy_shard", 3),
    (preprocess_run, "write_tables", 0),
    (preprocess_run, "mark_joined", 0),
    (preprocess_run, "move_into_place", 0),
    (join.os, "replace", 1),
    (join.os, "replace", 4),
    (WorkFolder, "remove", 0),
]


@pytest.mark.parametrize(("owner", "name", "calls"), STEPS)
def test_killed_at_any_step_of_the_join(folder, tmp_path, monkeypatch, owner, name, calls):
    monkeypatch.setattr(input_files, "MAX_RECORDS", 5)
    job = caption_job(folder, tmp_path / "out")
    quiet(job)
    expected = contents(tmp_path / "out")
    assert b"duplicate key" in expected[-1]
    for path in tmp_path.iterdir():
        path.unlink()
    original, left = getattr(owner, name), calls

    def dies(*arguments):
        nonlocal left
        # Files of shards are replaced, too; only those that take their final name count.
        if name == "replace" and "joined" not in str(arguments[0]):
            return original(*arguments)
        if left == 0:
            raise Killed
        left -= 1
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            quiet(job)
    assert (tmp_path / ".out.partial").exists()
    quiet(job)
    assert contents(tmp_path / "out") == expected
    assert not (tmp_path / ".out.partial").exists()


def test_finished_shards_are_not_worked_on_again(folder, tmp_path, monkeypatch):
    job = caption_job(folder, tmp_path / "out")
    monkeypatch.setattr(input_files, "MAX_RECORDS", 6)
    with monkeypatch.context() as patch:
        patch.setattr(preprocess_run, "plan_join", _die)
        with pytest.raises(Killed):
            quiet(job)
    counts = tmp_path / ".out.partial" / "00000002.counts.json"
    counts.unlink()
    read = []
    original = input_files.JsonlReader.read
    monkeypatch.setattr(
        input_files.JsonlReader,
        "read",
        lambda self, shard, options: read.append(shard) or original(self, shard, options),
    )
    quiet(job)
    assert [shard.first_record for shard in read] == [12]


def _die(*_):
    raise Killed


def test_another_job_is_not_resumed_and_without_resume_it_starts_anew(
    folder, tmp_path, monkeypatch
):
    source = str(shutil.copy(folder / "text" / "00.jsonl", tmp_path / "a.jsonl"))
    model, prefix = str(folder / "spm.model"), str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(preprocess_run, "plan_join", _die)
        with pytest.raises(Killed):
            quiet(PreprocessJob("text", (source,), model, prefix))
    with pytest.raises(ValueError, match=r"other settings \(limit: None -> 3\); run as before"):
        quiet(PreprocessJob("text", (source,), model, prefix, limit=3, resume=True))
    write_jsonl(Path(source), text_records(4))
    with pytest.raises(ValueError, match=r"other settings \(input files"):
        quiet(PreprocessJob("text", (source,), model, prefix, resume=True))
    quiet(PreprocessJob("text", (source,), model, prefix))
    whole = contents(Path(prefix))
    quiet(PreprocessJob("text", (source,), model, str(tmp_path / "again"), resume=True))
    assert contents(tmp_path / "again") == whole


def test_two_runs_of_one_dataset_do_not_mix(folder, tmp_path):
    first = WorkFolder(tmp_path / "out")
    first.open({}, resume=False)
    job = PreprocessJob(
        "text",
        (str(folder / "text" / "00.jsonl"),),
        str(folder / "spm.model"),
        str(tmp_path / "out"),
        resume=True,
    )
    with pytest.raises(ValueError, match="another run is writing this dataset"):
        quiet(job)
    first.close()


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs the mpich wheel (extra `mpi`)")
@pytest.mark.parametrize(("num_ranks", "resumes"), [(2, False), (3, True)])
def test_mpi_ranks_write_the_same_bytes(
    folder, uninterrupted, tmp_path, monkeypatch, num_ranks, resumes
):
    """Also where they take up what a run without MPI left behind."""
    prefix = tmp_path / "out"
    command = [str(MPIRUN), "-n", str(num_ranks), *tool_arguments(folder, prefix)]
    if resumes:
        source, model = str(folder / "text" / "*.jsonl"), str(folder / "spm.model")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(preprocess_run, "plan_join", _die)
            quiet(PreprocessJob("text", (source,), model, str(prefix)))
        for unfinished in sorted((tmp_path / ".out.partial").glob("*.counts.json"))[1::2]:
            unfinished.unlink()
        command.append("--resume")
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert contents(prefix) == uninterrupted
    assert done.stdout.count("samples") == 1 and "100%" in done.stderr


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs the mpich wheel (extra `mpi`)")
def test_mpi_errors_end_all_ranks(folder, tmp_path):
    command = [str(MPIRUN), "-n", "2", *tool_arguments(folder, tmp_path / "out")]
    too_many = subprocess.run(
        [*command, "--max-rejects", "3"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert too_many.returncode == 3 and "--max-rejects allows 3" in too_many.stderr
    assert not Path(f"{tmp_path}/out.json").exists()
    workers = subprocess.run(
        [*command, "--workers", "2"], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert workers.returncode == 2 and "leave --workers out" in workers.stderr
    missing = subprocess.run(
        [*command[:-2], "--output-prefix", str(tmp_path / "o"), "--input", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert missing.returncode == 2 and "matches no file" in missing.stderr
    assert "Traceback" not in too_many.stderr + workers.stderr + missing.stderr


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs the mpich wheel (extra `mpi`)")
@pytest.mark.parametrize(
    "variables",
    [{"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, {"OMPI_COMM_WORLD_SIZE": "4"}],
)
def test_a_world_of_one_inside_a_launch_of_several_is_refused(folder, tmp_path, variables):
    done = subprocess.run(
        tool_arguments(folder, tmp_path / "out"),
        capture_output=True,
        text=True,
        env=environment(**variables),
    )
    assert done.returncode == 2
    assert "the launcher started 4 tasks" in done.stderr and "sees 1" in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_a_launcher_mpi_is_not_imported(folder, tmp_path):
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "    assert not {'mpi4py', 'torch', 'megatron', 'pyarrow'} & set(sys.modules)\n"
    )
    arguments = tool_arguments(folder, tmp_path / "out")[1:]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment())
    assert choose_workers(3, {"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": ""}).size == 3
