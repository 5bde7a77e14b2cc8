"""How a process learns what started it, and as which of how many."""

from __future__ import annotations

import pytest

from megatron_kosmosg import launcher
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.launcher import (
    ALONE,
    RankInfo,
    find_rank_info,
    find_tasks,
    find_worker,
    first_host,
    is_first_rank,
)


def test_alone_without_any_variables() -> None:
    assert find_rank_info({}) == RankInfo(0, 1, 0, None, None)


def test_torchrun() -> None:
    variables = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    variables |= {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    assert find_rank_info(variables) == RankInfo(3, 8, 1, "node1", 1234)


def test_half_set_variables_are_an_error() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT, WORLD_SIZE"):
        find_rank_info({"RANK": "0"})


def test_slurm_step() -> None:
    variables = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "9",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[007-008]",
    }
    assert find_rank_info(variables) == RankInfo(9, 16, 1, "gpu007", 10770)


def test_batch_script_itself_is_no_rank() -> None:
    assert find_rank_info({"SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}).world_size == 1


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


def torchrun(rank: int, world_size: int) -> dict[str, str]:
    variables = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    return variables | {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}


def array(number: int, last: int = 13) -> dict[str, str]:
    values = {"ID": number, "MIN": 10, "MAX": last, "COUNT": 4}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"}


def test_workers_are_ranks_array_tasks_and_those_of_mpi() -> None:
    assert find_worker({}) == ALONE == find_rank_info(OPEN_MPI)
    assert find_worker(array(12) | torchrun(1, 8)) == RankInfo(17, 32, 1)
    every = [find_worker(array(n) | torchrun(r, 3)) for n in range(10, 14) for r in range(3)]
    taken = sorted(shard for place in every for shard in place.share(50))
    assert taken == list(range(50)), "each shard once"
    assert find_worker(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}) == RankInfo(5, 8, 1)
    assert find_worker({"PMI_RANK": "2", "PMI_SIZE": "3"}) == RankInfo(2, 3, 2)
    found = find_worker(OPEN_MPI | torchrun(2, 4))
    assert (found.rank, found.world_size) == (2, 4), "torchrun goes before"


def test_an_array_whose_tasks_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ConfigError, match="has gaps"):
        find_worker(array(12, last=20))
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_COUNT is not"):
        find_worker({name: value for name, value in array(12).items() if "COUNT" not in name})


def test_tasks_are_the_most_that_a_launcher_says() -> None:
    assert find_tasks({"PMI_SIZE": ""}) == (1, "")
    assert find_tasks({"SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "1"}) == (4, "SLURM_STEP_NUM_TASKS")
    assert find_tasks(OPEN_MPI) == (8, "OMPI_COMM_WORLD_SIZE")


def test_one_rank_speaks_for_all_even_where_variables_are_missing() -> None:
    assert is_first_rank({}) and is_first_rank({"RANK": "0"}) and not is_first_rank({"RANK": "1"})
    assert not is_first_rank({"SLURM_PROCID": "3"})
    assert is_first_rank({"RANK": "0", "SLURM_PROCID": "3"}), "torchrun under srun"


@pytest.mark.parametrize(
    ("started", "typed"),
    [
        ("/usr/bin/kosmosg", "kosmosg plan"),
        ("tools/plan.py", "tools/plan.py"),
        ("/x/megatron_kosmosg/__main__.py", "python -m megatron_kosmosg plan"),
        ("/x/megatron_kosmosg/train.py", "python -m megatron_kosmosg.train"),
    ],
)
def test_a_command_is_named_as_it_was_typed(started, typed, monkeypatch) -> None:
    monkeypatch.setattr(launcher.sys, "argv", [started])
    assert launcher.as_typed("plan") == typed


def test_slurm_names_the_node_before_the_system_does(monkeypatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "gpu007")
    assert launcher.node_name() == "gpu007"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert launcher.node_name() == launcher.socket.gethostname()


def test_half_set_variables_end_a_training_in_one_line(monkeypatch, capsys) -> None:
    from megatron_kosmosg import train

    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert train.main(["--config", "debug_pretrain"]) == 2
    assert capsys.readouterr().err.startswith("error: RANK is set but ")
