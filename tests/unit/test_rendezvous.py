"""How ranks meet."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.launcher import Place
from megatron_kosmosg.parallel.rendezvous import meet


def test_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
            meet(Place(0, 2, 0, "127.0.0.1", port), timedelta(seconds=5))


def test_absent_rank_zero_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ConfigError, match="rank 1 could not reach rank 0"):
        meet(Place(1, 2, 1, "127.0.0.1", port), timedelta(seconds=2))
