"""`kosmosg launch`: ranks meet on the loopback interface, hear signals, and end together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_kosmosg.cli import launch
from tests.support.ranks import free_port

RANK = """
import os, signal, sys, time
rank, folder = int(os.environ["RANK"]), sys.argv[-1]
def note(what):
    with open(os.path.join(folder, f"rank-{rank}"), "a") as file: file.write(f"{what}\\n")
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts ranks that run a few lines of Python; the launcher's process."""

    def start(ranks: int, *lines: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
        # A stand-in for the package: what `-m megatron_kosmosg COMMAND` would run.
        program = tmp_path / "rank.py"
        program.write_text(RANK + "\n".join(lines))
        launcher = (
            "import sys, subprocess\n"
            "from megatron_kosmosg.cli import launch\n"
            "real = subprocess.Popen\n"
            f"launch.subprocess.Popen = lambda command, **more: "
            f"real([sys.executable, {str(program)!r}, {str(tmp_path)!r}], **more)\n"
            f"sys.exit(launch.main(['--ranks', '{ranks}', *{options!r}, 'train']))\n"
        )
        return subprocess.Popen([sys.executable, "-c", launcher], start_new_session=True)

    return start


def noted(folder: Path, rank: int) -> list[str]:
    path = folder / f"rank-{rank}"
    return path.read_text().split() if path.exists() else []


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_all_ranks_done_is_done(tmp_path, start):
    assert start(3, "note(os.environ['WORLD_SIZE'])").wait(60) == 0
    assert [noted(tmp_path, rank) for rank in range(4)] == [["3"], ["3"], ["3"], []]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_once_and_its_code_comes_back(tmp_path, start, number):
    process = start(
        2,
        f"signal.signal({int(number)}, lambda *_: note('heard'))",
        "note('ready')",
        "while not os.path.exists(os.path.join(folder, 'end')): time.sleep(0.05)",
        "sys.exit(85)",
    )
    wait_for(lambda: noted(tmp_path, 0) and noted(tmp_path, 1))
    process.send_signal(number)
    wait_for(lambda: len(noted(tmp_path, 0)) > 1 and len(noted(tmp_path, 1)) > 1)
    (tmp_path / "end").touch()
    assert process.wait(60) == 85
    assert noted(tmp_path, 0) == noted(tmp_path, 1) == ["ready", "heard"]


@pytest.mark.parametrize(
    ("failing", "code"), [("sys.exit(2)", 2), ("os.kill(os.getpid(), signal.SIGKILL)", 137)]
)
def test_ranks_that_wait_for_one_that_failed_are_ended(tmp_path, start, failing, code):
    begun = time.monotonic()
    process = start(2, "note('up')", f"if rank == 1: {failing}", "time.sleep(300)")
    assert process.wait(120) == code and time.monotonic() - begun < 100


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path, start):
    process = start(2, "note(os.getpid())", "time.sleep(300)")
    wait_for(lambda: noted(tmp_path, 0) and noted(tmp_path, 1))
    process.kill()
    process.wait()

    def is_gone(rank: int) -> bool:
        stat = Path("/proc", noted(tmp_path, rank)[0], "stat")
        return not stat.exists() or stat.read_text().split(") ")[1][0] == "Z"

    wait_for(lambda: is_gone(0) and is_gone(1), 20)


MEET = """
import datetime, re
from megatron_kosmosg.launcher import find_rank_info
from megatron_kosmosg.parallel.rendezvous import connect_to_store, meet
rank_info, wait = find_rank_info(), datetime.timedelta(seconds=60)
store = meet(rank_info, wait)
store.set(f"rank {rank_info.rank}", "here")
assert store.get("rank 0") == store.get("rank 1") == b"here"
connect_to_store(rank_info, wait).set("more", "1")
hosts = set()
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/net/{table}").readlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        host, port = local.split(":")
        if state == "0A" and int(port, 16) == rank_info.port: hosts.add(host)
note(",".join(hosts))
store.set(f"done {rank_info.rank}", "1"); store.get("done 0"); store.get("done 1")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net")
def test_the_ranks_port_is_open_on_the_loopback_interface_alone(tmp_path, start):
    assert start(2, *MEET.splitlines()).wait(180) == 0
    assert noted(tmp_path, 0) == noted(tmp_path, 1) == ["0100007F"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net")
def test_launchers_of_two_machines_meet_at_the_first_ones_address(tmp_path, start):
    options = ("--nodes", "2", "--address", f"127.0.0.2:{free_port()}", "--node-rank")
    machines = [start(1, *MEET.splitlines(), options=(*options, rank)) for rank in "01"]
    assert [machine.wait(180) for machine in machines] == [0, 0]
    assert noted(tmp_path, 0) == noted(tmp_path, 1) == ["0200007F"]  # 127.0.0.2


@pytest.mark.parametrize(
    "options", [("--nodes", "2"), ("--address", "node0:1"), ("--node-rank", "1")]
)
def test_half_a_place_among_machines_is_refused(options, capsys):
    with pytest.raises(SystemExit) as ended:
        launch.main(["--ranks", "1", *options, "train"])
    assert ended.value.code == 2 and "--node" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net")
def test_so_it_is_for_ranks_that_another_launcher_gives_an_address(tmp_path):
    program = tmp_path / "rank.py"
    program.write_text(RANK + MEET)
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "19737"}
    ranks = [
        subprocess.Popen(
            [sys.executable, program, tmp_path],
            env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(180) for rank in ranks] == [0, 0]
    assert noted(tmp_path, 0) == ["0100007F"]


def test_a_command_that_there_is_not_is_said(capsys):
    with pytest.raises(SystemExit) as ended:
        launch.main(["--ranks", "2", "trian"])
    assert ended.value.code == 2 and re.search("no command trian.*train", capsys.readouterr().err)
