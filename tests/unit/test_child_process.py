"""A score rank works in a child of the process that a launcher started: what that ends with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_kosmosg.config.paths import LOST_RANKS_FILE, SCORE_RANKS_FILE
from megatron_kosmosg.monitoring.lost_ranks import lost_ranks
from megatron_kosmosg.monitoring.run_owner import OWNER_FILE

CODE = """
import os, signal, sys, time
from pathlib import Path
from megatron_kosmosg.score import run_watch
from megatron_kosmosg.score.child_process import go_on_as_child
run_watch.GONE_SECONDS = run_watch.FEWEST_SECONDS = 1.0
run_watch.LOOK_SECONDS = 0.1
first, run = os.getpid(), run_watch.RunWatch(Path(sys.argv[1]), 1.5, float(sys.argv[2]))
own = go_on_as_child("score rank 7", run)
assert os.getppid() == first
if sys.argv[3]:
    own.has_joined(sys.argv[3])
print(os.getpid(), flush=True)
"""


def started(
    work: str, run: Path = Path(), timeout: float = 60, joined: str = ""
) -> tuple[subprocess.Popen, int]:
    """(the process, its child, which does `work`). run, timeout, joined: of the run that goes on
    without it: its folder, timeout_seconds and the start that it works for."""
    command = [sys.executable, "-c", CODE + work, str(run), str(timeout), joined]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.fixture
def decoder() -> Iterator[socket.socket]:
    """Where the first decoder rank listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def going_on(folder: Path, decoder: socket.socket) -> Path:
    """A run's folder, as it is while the run trains."""
    address = f"tcp://127.0.0.1:{decoder.getsockname()[1]}"
    content = {"start": "this one", "decoders": [{"address": address}]}
    (folder / SCORE_RANKS_FILE).write_text(json.dumps(content))
    (folder / OWNER_FILE).touch()
    return folder


def still_there(process: subprocess.Popen, seconds: float, run: Path) -> bool:
    """Whether it lasts for so long, while rank 0 gives signs of life."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        os.utime(run / OWNER_FILE)
        time.sleep(0.1)
    return process.poll() is None


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until_it_is_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_there(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("code", [0, 2, 85])
def test_its_exit_code_is_the_childs(code):
    process, _ = started(f"sys.exit({code})")
    assert process.wait(20) == code


@pytest.mark.parametrize(
    ("number", "joined"),
    [(signal.SIGKILL, "this one"), (signal.SIGSEGV, "")],
    ids=["killed at work", "crashed before it joined"],
)
def test_the_task_of_a_child_that_dies_stays_until_the_run_ends(number, joined, decoder, tmp_path):
    """Slurm ends all tasks some time after the first (`srun --wait`), whatever its exit code."""
    run = going_on(tmp_path, decoder)
    process, child = started("time.sleep(60)", run, joined=joined)
    os.kill(child, number)
    assert still_there(process, 1.2, run)
    (run / SCORE_RANKS_FILE).unlink()
    _, output = process.communicate(timeout=20)
    assert process.returncode == 0
    assert f"was ended by {number.name}, which does not end the run" in output
    assert "stall" not in output
    (lost,) = lost_ranks(run, time.time() - 60)
    assert lost.startswith("score rank 7 on ") and lost.endswith(f"was ended by {number.name}")
    assert lost_ranks(run, time.time() + 60) == [] and (run / LOST_RANKS_FILE).is_file()


def test_the_task_of_a_child_that_says_it_is_lost_stays_until_the_next_start(decoder, tmp_path):
    run = going_on(tmp_path, decoder)
    process, child = started("own.is_lost()", run, joined="this one")
    until_it_is_gone(child)
    time.sleep(0.5)  # until its parent has noticed, too
    process.send_signal(signal.SIGUSR1)  # the run saves, which may take long
    assert still_there(process, 1.2, run)
    text = (run / SCORE_RANKS_FILE).read_text()
    (run / SCORE_RANKS_FILE).write_text(text.replace("this one", "the next"))
    assert process.wait(20) == 0


def test_the_task_of_a_lost_rank_ends_when_it_is_told_to(decoder, tmp_path):
    run = going_on(tmp_path, decoder)
    process, _ = started("own.is_lost()", run, joined="this one")
    assert still_there(process, 1.2, run)
    process.terminate()
    assert process.wait(20) == 0


@pytest.mark.parametrize("what", ["dead", "stopped"])
def test_the_task_of_a_lost_rank_ends_its_job_when_rank_0_is(what, decoder, tmp_path):
    """A rank 0 that is stopped keeps its connections, and says nothing."""
    run = going_on(tmp_path, decoder)
    process, child = started("time.sleep(60)", run, 60 if what == "dead" else 3, "this one")
    os.kill(child, signal.SIGKILL)
    assert still_there(process, 1.2, run)
    if what == "dead":
        decoder.close()
    _, output = process.communicate(timeout=20)
    assert process.returncode == 1
    if what == "dead":
        assert "the first decoder rank is gone: no connection" in output
    else:
        assert "stall: no sign of life from rank 0 (" in output
        assert "no sign of life from rank 0 for " in output


def test_signals_are_passed_on():
    work = "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(85))\nprint('x', flush=True)\n"
    process, _ = started(work + "time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline() == "x\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 85


def test_a_signal_that_the_child_does_not_listen_for_is_told():
    process, _ = started("time.sleep(60)")
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_the_child_ends_with_its_parent():
    process, child = started("time.sleep(60)")
    process.kill()
    process.wait(20)
    until_it_is_gone(child)
