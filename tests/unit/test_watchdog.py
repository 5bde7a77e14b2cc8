"""Where a rank is said to be while torch runs its backward pass in a thread of its own, as on a
GPU."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_kosmosg.launcher import ALONE
from megatron_kosmosg.monitoring import watchdog
from megatron_kosmosg.monitoring.watchdog import Watchdog


@contextmanager
def torchs_thread(file: str) -> Iterator[None]:
    """A thread that Python did not begin waits in a function of `file`."""
    begun, ended = threading.Event(), threading.Event()
    names = {"begun": begun, "ended": ended}
    code = "def wait():\n    begun.set()\n    ended.wait()\n"
    exec(compile(code, file, "exec"), names)
    _thread.start_new_thread(names["wait"], ())
    assert begun.wait(10)
    yield
    ended.set()


def test_a_backward_pass_that_waits_for_a_score_rank_is_a_rank_that_waits(tmp_path):
    rank = Watchdog(ALONE, 60, tmp_path / "heartbeat.json")
    assert not rank._heartbeat().waits
    with torchs_thread(f"{watchdog.PACKAGE}/score/fleet.py"):
        heartbeat = rank._heartbeat()
    assert heartbeat.waits and heartbeat.place == "score/fleet.py:3"


def test_a_thread_that_reads_is_not_where_a_rank_is(tmp_path):
    rank = Watchdog(ALONE, 60, tmp_path / "heartbeat.json")
    ended = threading.Event()
    names = {"ended": ended}
    exec(compile("def wait():\n    ended.wait()\n", "torch/distributed/store.py", "exec"), names)
    reader = threading.Thread(target=names["wait"])
    reader.start()
    assert not rank._heartbeat().waits
    ended.set()
    reader.join()
