"""A score rank works in a child of the process that a launcher started: what that ends with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

CODE = """
import os, signal, sys, time
from megatron_kosmosg.score.own_process import go_on_as_child
first = os.getpid()
go_on_as_child("score rank 7")
assert os.getppid() == first
print(os.getpid(), flush=True)
"""


def started(work: str) -> tuple[subprocess.Popen, int]:
    """(the process, its child, which does `work`)."""
    command = [sys.executable, "-c", CODE + work]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("code", [0, 2, 85])
def test_its_exit_code_is_the_childs(code):
    process, _ = started(f"sys.exit({code})")
    assert process.wait(20) == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_dies_is_no_failure_of_the_task(number):
    process, child = started("time.sleep(60)")
    os.kill(child, number)
    _, output = process.communicate(timeout=20)
    assert process.returncode == 0
    assert f"score rank 7 was ended by {number.name}; the run goes on without it" in output


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
    deadline = time.monotonic() + 20
    while is_there(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
