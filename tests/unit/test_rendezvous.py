"""How ranks meet."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from datetime import timedelta

import pytest

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


def test_rank_zero_says_within_the_time_who_is_missing(capsys) -> None:
    """Ranks 0 and 2 of 4 are here; the wait for all four ends at its timeout."""
    port = free_port()

    def begin(rank: int) -> None:
        rank_info = RankInfo(rank, 4, rank, "127.0.0.1", port)
        with Arrivals(rank_info, seconds=1), suppress(ConfigError):
            meet(rank_info, timedelta(seconds=6))

    ranks = [threading.Thread(target=begin, args=(rank,)) for rank in (0, 2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    output = capsys.readouterr().err.splitlines()
    assert any(f"at 127.0.0.1:{port} for ranks 1, 3 of 4" in line for line in output), output
    assert all("rank 0 has waited" in line for line in output)


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
        with Arrivals(rank_info, seconds=20):
            stores.append(meet(rank_info, timedelta(seconds=20)))

    ranks = [threading.Thread(target=begin, args=(rank,)) for rank in (1, 0)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(stores) == 2 and capsys.readouterr().err == ""
