"""What started this process, as which of how many: a launcher, Slurm, MPI, or a user alone.

The one reader of their variables. Answered without torch, before there are process groups, so that
a wrong setting is refused before anything is loaded.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmosg.config.errors import ConfigError

_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
"""Open MPI's mpirun; MPICH's and Intel's mpirun, srun --mpi=pmi2: rank, ranks, rank on the node."""
_SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
"""Of srun of any kind; sbatch and salloc alone set only the job's variables."""
_ARRAY = "SLURM_ARRAY_TASK_"
LISTENER = "KOSMOSG_LISTENER"
"""`kosmosg launch` tells rank 0 the file descriptor of the socket at which the ranks meet."""

Environment = Mapping[str, str]


@dataclass(frozen=True)
class RankInfo:
    """Rank of this process, where it sits on its node, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    address: str | None = None
    """Host of rank 0; None for a process that meets no other."""
    port: int | None = None
    listener: int | None = None
    """Of rank 0: an open socket that is bound to that port already."""

    def share(self, num_shards: int) -> range:
        """The shards of this process: rank, rank + world_size, ..."""
        return range(self.rank, num_shards, self.world_size)


ALONE = RankInfo(rank=0, world_size=1, local_rank=0)


def find_rank_info(environment: Environment | None = None) -> RankInfo:
    """This process's place according to torchrun's variables, else Slurm's, else alone.

    Args:
        environment: the variables to look at; None takes the process's.

    Raises ConfigError where half of them are set.
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment:
        missing = {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - environment.keys()
        if missing:
            raise ConfigError(
                f"RANK is set but {', '.join(sorted(missing))} is not; start ranks with torchrun "
                "or srun, or unset RANK to run alone"
            )
        return RankInfo(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            address=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
            listener=int(environment[LISTENER]) if LISTENER in environment else None,
        )
    if "SLURM_PROCID" in environment and _SLURM_TASKS in environment:
        step = f"{environment['SLURM_JOB_ID']}{environment.get('SLURM_STEP_ID', '0')}"
        return RankInfo(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment[_SLURM_TASKS]),
            local_rank=int(environment["SLURM_LOCALID"]),
            address=environment.get("MASTER_ADDR")
            or first_host(environment["SLURM_STEP_NODELIST"]),
            port=int(environment.get("MASTER_PORT", 10000 + int(step) % 20000)),
        )
    return ALONE


def find_worker(environment: Environment | None = None) -> RankInfo:
    """The place among processes that share nothing but a folder, and need not meet.

    Where neither torchrun nor srun started several, mpirun's ranks count, too; the tasks of a Slurm
    job array divide the work once more. Raises ConfigError for an array with gaps, whose tasks
    cannot know how many they are.
    """
    environment = os.environ if environment is None else environment
    rank_info = find_rank_info(environment)
    if rank_info.world_size == 1:
        for rank, size, local_rank in _MPI:
            if rank in environment and size in environment:
                local = int(environment.get(local_rank, environment[rank]))
                rank_info = RankInfo(int(environment[rank]), int(environment[size]), local)
                break
    if f"{_ARRAY}ID" not in environment:
        return rank_info
    needed = [f"{_ARRAY}{name}" for name in ("ID", "MIN", "MAX", "COUNT")]
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ConfigError(f"{_ARRAY}ID is set but {', '.join(missing)} is not")
    number, first, last, count = (int(environment[name]) for name in needed)
    if last - first + 1 != count:
        raise ConfigError(
            f"a job array of {count} tasks from {first} to {last} has gaps, so its tasks cannot "
            "share the work; submit --array=0-N (finished shards are skipped)"
        )
    rank = (number - first) * rank_info.world_size + rank_info.rank
    return RankInfo(rank, count * rank_info.world_size, rank_info.local_rank)


def find_tasks(environment: Environment | None = None) -> tuple[int, str]:
    """How many tasks mpirun or srun started, 1 without them, and the variable that says it."""
    environment = os.environ if environment is None else environment
    names = [*(size for _, size, _ in _MPI), _SLURM_TASKS]
    counts = {name: int(environment[name]) for name in names if environment.get(name)}
    most = max(counts, key=lambda name: counts[name], default="")
    return counts.get(most, 1), most


def find_job(environment: Environment | None = None) -> tuple[str, int]:
    """Slurm's number of the job, "" without one, and how often Slurm had started it before."""
    environment = os.environ if environment is None else environment
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    return environment.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdecimal() else 0


def is_first_rank(environment: Environment | None = None) -> bool:
    """Whether this process speaks for all, also where the variables are not whole."""
    environment = os.environ if environment is None else environment
    return environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"


def has_agent() -> bool:
    """Whether torchrun's agent keeps the store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt() -> str:
    """Which start of the ranks this is under torchrun, which starts them again by itself."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def node_name() -> str:
    """The name of this machine, as Slurm knows it; else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: "gpu[007-009,12],cpu1" -> "gpu007"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", node_list)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={node_list!r} cannot be read; set MASTER_ADDR")
    prefix, first, suffix = match.groups()
    return prefix + (first or "") + (suffix or "")


def as_typed(name: str) -> str:
    """How the user called the command: `kosmosg NAME`, or what stands for it in a checkout."""
    started = Path(sys.argv[0])
    if started.parent.name == "tools":
        return f"tools/{started.name}"
    if started.parent.name == __package__ and started.name in ("__main__.py", "train.py"):
        module = __package__ if started.stem == "__main__" else f"{__package__}.train"
        return f"python -m {module}" + ("" if started.stem == "train" else f" {name}")
    return f"kosmosg {name}"
