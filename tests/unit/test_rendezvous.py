"""How ranks meet."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.launcher import RankInfo
from megatron_kosmosg.parallel.arrivals import Arrivals
from megatron_kosmosg.parallel.rendezvous import meet


def test_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
            meet(RankInfo(0, 2, 0, "127.0.0.1", port), timedelta(seconds=5))


def test_absent_rank_zero_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ConfigError, match="rank 1 could not reach rank 0"):
        meet(RankInfo(1, 2, 1, "127.0.0.1", port), timedelta(seconds=2))


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def test_rank_zero_says_who_is_missing_until_all_have_come(capsys) -> None:
    """Of 4 ranks 0 and 2 are here; the others come once they have been named."""
    port = free_port()
    stores = []

    def begin(rank: int) -> None:
        rank_info = RankInfo(rank, 4, rank, "127.0.0.1", port)
        with Arrivals(rank_info, seconds=0.2) as arrivals:
            stores.append(store := meet(rank_info, timedelta(seconds=60)))
            arrivals.sign(store)

    ranks = [threading.Thread(target=begin, args=(rank,), daemon=True) for rank in (0, 2, 1, 3)]
    for rank in ranks[:2]:
        rank.start()
    output, deadline = "", time.monotonic() + 50
    while f"at 127.0.0.1:{port} for ranks 1, 3 of 4" not in output:
        assert time.monotonic() < deadline, output
        time.sleep(0.05)
        output += capsys.readouterr().err
    for rank in ranks[2:]:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(stores) == 4
    assert all("rank 0 has waited" in line for line in output.splitlines())


def test_a_rank_that_came_before_rank_zero_is_not_named_missing_for_long(capsys) -> None:
    """Its wait ends as soon as rank 0 listens, maybe before anything beside it looks again."""
    port = free_port()
    stores = []

    def begin(rank: int) -> None:
        rank_info = RankInfo(rank, 3, rank, "127.0.0.1", port)
        with Arrivals(rank_info, seconds=0.5 if rank == 0 else 60) as arrivals:
            stores.append(store := meet(rank_info, timedelta(seconds=60)))
            arrivals.sign(store)

    ranks = [threading.Thread(target=begin, args=(rank,), daemon=True) for rank in (1, 0, 2)]
    ranks[0].start()
    time.sleep(0.3)  # rank 1 has knocked in vain, and looks again after a second
    ranks[1].start()
    output, deadline = "", time.monotonic() + 50
    while "for rank 2 of 3" not in output:
        # Until torch's client of rank 1 asks again, which takes seconds, both are missing.
        assert time.monotonic() < deadline, output
        time.sleep(0.05)
        output += capsys.readouterr().err
    ranks[2].start()
    for rank in ranks:
        rank.join()
    assert len(stores) == 3


def test_a_rank_whose_rank_zero_is_missing_says_so(capsys) -> None:
    rank_info = RankInfo(1, 2, 0, "127.0.0.1", free_port())
    with Arrivals(rank_info, seconds=0.2), suppress(ConfigError):
        meet(rank_info, timedelta(seconds=4))
    assert (
        "rank 1 has waited" in (output := capsys.readouterr().err) and "for rank 0 of 2" in output
    )


def test_nobody_speaks_where_all_come(capsys) -> None:
    port = free_port()
    stores = []

    def begin(rank: int) -> None:
        rank_info = RankInfo(rank, 2, rank, "127.0.0.1", port)
        with Arrivals(rank_info, seconds=20) as arrivals:
            stores.append(store := meet(rank_info, timedelta(seconds=20)))
            arrivals.sign(store)

    ranks = [threading.Thread(target=begin, args=(rank,), daemon=True) for rank in (1, 0)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(stores) == 2 and capsys.readouterr().err == ""


def test_ranks_that_start_again_read_nothing_of_the_start_before(monkeypatch) -> None:
    """torchrun's store outlives them; its agent listens at their address."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    place = RankInfo(0, 2, 0, "127.0.0.1", agent.port)
    started = {}
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        started[attempt] = meet(place, timedelta(seconds=5))
        assert not started[attempt].check(["address"])
        started[attempt].set("address", f"of start {attempt}")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert started["0"].get("address") == b"of start 0"
    assert meet(place, timedelta(seconds=5)).get("address") == b"of start 0"
