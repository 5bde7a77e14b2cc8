"""How a process finds its rank."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.parallel.rendezvous import Place, find_place, first_host, meet


def test_alone_without_any_variables() -> None:
    assert find_place({}) == Place(0, 1, 0, None, None)


def test_torchrun() -> None:
    variables = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    variables |= {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    assert find_place(variables) == Place(3, 8, 1, "node1", 1234)


def test_half_set_variables_are_an_error() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT, WORLD_SIZE"):
        find_place({"RANK": "0"})


def test_slurm_step() -> None:
    variables = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "9",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[007-008]",
    }
    assert find_place(variables) == Place(9, 16, 1, "gpu007", 10770)


def test_batch_script_itself_is_no_rank() -> None:
    assert find_place({"SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}).world_size == 1


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-009,12],cpu1", "gpu007"),
        ("rack[3,5]-a", "rack3-a"),
    ],
)
def test_first_host(node_list: str, first: str) -> None:
    assert first_host(node_list) == first


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
