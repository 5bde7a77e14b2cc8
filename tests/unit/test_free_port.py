"""Ports for the ranks of a test: free, and not those that outgoing connections are given."""

from __future__ import annotations

import socket

from tests.support import ranks


class SampleKey:
    def __init__(self, *ports: int) -> None:
        self.left = list(ports)

    def choice(self, ports: range) -> int:
        assert self.left[0] in ports
        return self.left.pop(0)


def test_a_port_is_no_ephemeral_one():
    assert all(ranks.free_port() in ranks._PORTS for _ in range(50))


def test_a_taken_port_is_passed_over(monkeypatch):
    free = ranks.free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ranks.free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(ranks, "_SYSTEM_RANDOM", SampleKey(port, port, free))
        assert ranks.free_port() == free
