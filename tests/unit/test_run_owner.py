"""Who may write a run folder: one at a time, also when the one before is dead or frozen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_kosmosg.monitoring import run_owner
from megatron_kosmosg.monitoring.run_owner import OWNER_FILE, RunFolderTaken, RunOwner


def silent(message: str) -> None:
    pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_owner, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_owner, "STALE_SECONDS", 1.0)


def leave_behind(folder: Path, age: float = 0.0, **changes) -> Path:
    """An owner's file whose owner is not there any more."""
    with RunOwner(folder, silent):
        content = json.loads((folder / OWNER_FILE).read_text())
    path = folder / OWNER_FILE
    path.write_text(json.dumps(content | changes))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_folder_is_free_again_after_the_run(tmp_path):
    for _ in range(2):
        with RunOwner(tmp_path / "run", silent) as owner:
            owner.check()
        assert os.listdir(tmp_path / "run") == []


def test_a_second_run_is_refused_with_who_has_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with RunOwner(tmp_path, silent) as first:
        begun = time.monotonic()
        with pytest.raises(
            RunFolderTaken, match=rf"Slurm job 4711, process {os.getpid()} of .* on"
        ):
            RunOwner(tmp_path, silent).__enter__()
        assert time.monotonic() - begun < 1.0, "a sign of life is enough"
        first.check()
    assert os.listdir(tmp_path) == []


def test_a_killed_process_of_this_machine_is_known_to_be_gone(tmp_path):
    program = (
        "import os, sys, pathlib\n"
        "from megatron_kosmosg.monitoring.run_owner import RunOwner\n"
        "RunOwner(pathlib.Path(sys.argv[1]), print).__enter__()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == -9 and (tmp_path / OWNER_FILE).exists()
    output: list[str] = []
    begun = time.monotonic()
    with RunOwner(tmp_path, output.append) as owner:
        owner.check()
    assert time.monotonic() - begun < 0.5 and "former owner is gone" in output[0]


def test_a_number_that_a_later_process_got_is_not_the_owner(tmp_path):
    leave_behind(tmp_path, pid=os.getppid())
    with RunOwner(tmp_path, silent) as owner:
        owner.check()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}'])
def test_a_file_that_says_nothing_is_waited_for(tmp_path, content):
    (tmp_path / OWNER_FILE).write_text(content)
    begun = time.monotonic()
    with RunOwner(tmp_path, silent):
        assert time.monotonic() - begun > 0.9
    old = time.time() - 100
    (tmp_path / OWNER_FILE).write_text(content)
    os.utime(tmp_path / OWNER_FILE, (old, old))
    begun = time.monotonic()
    with RunOwner(tmp_path, silent):
        assert time.monotonic() - begun < 0.5


def test_an_owner_elsewhere_is_dead_when_it_gives_no_sign(tmp_path):
    leave_behind(tmp_path, machine="another", node="gpu07")
    output: list[str] = []
    begun = time.monotonic()
    with RunOwner(tmp_path, output.append):
        assert time.monotonic() - begun > 0.9
    assert "gpu07" in output[0] and "waiting" in output[0] and "former owner is gone" in output[1]


def test_the_same_job_started_again_waits_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    leave_behind(tmp_path, machine="another")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begun = time.monotonic()
    with RunOwner(tmp_path, silent):
        assert time.monotonic() - begun < 0.5


def test_an_owner_taken_for_dead_writes_nothing_more(tmp_path):
    frozen = RunOwner(tmp_path, silent)
    frozen._create()  # its thread does not run, as if the process were stopped
    path = tmp_path / OWNER_FILE
    content = json.loads(path.read_text()) | {"machine": "another"}
    path.write_text(json.dumps(content))
    with RunOwner(tmp_path, silent) as owner:
        with pytest.raises(RunFolderTaken, match="was taken over while this run gave no sign"):
            frozen.check()
        frozen._thread.start()
        frozen.__exit__(None, None, None)
        owner.check()  # the late one has not removed the file of the new one


def test_of_many_that_come_at_once_one_gets_it(tmp_path):
    leave_behind(tmp_path, age=100, machine="another")
    got: list[RunOwner] = []
    refused: list[str] = []
    start = threading.Barrier(12)

    def come() -> None:
        start.wait()
        try:
            got.append(RunOwner(tmp_path, silent).__enter__())
        except RunFolderTaken as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alive = []
    for owner in got:
        try:
            owner.check()
            alive.append(owner)
        except RunFolderTaken:
            pass
        owner._ended.set()
    assert len(alive) == 1 and len(got) + len(refused) == 12


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / OWNER_FILE).symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        RunOwner(tmp_path / "run", silent).__enter__()
    assert not (tmp_path / "target").exists()
