"""Which share of the shards a process works on: its rank, under torchrun, Slurm, MPI or an array.

Processes share nothing but the output folder, so tasks of a Slurm job array count as ranks, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ARRAY = "SLURM_ARRAY_TASK_"
MPI_NAMES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True)
class Share:
    """Shards rank, rank + world_size, ..; local_rank chooses the GPU."""

    rank: int
    world_size: int
    local_rank: int

    def of(self, num_shards: int) -> range:
        """The shards of this process."""
        return range(self.rank, num_shards, self.world_size)


def find_share(environment: Mapping[str, str], alone: Share) -> Share:
    """The share of this process.

    alone: what torchrun and srun say, (0, 1, 0) where they did not start it; then mpirun's
    variables count. The tasks of a job array divide the work once more. Raises ValueError for an
    array with gaps, whose tasks cannot know how many they are.
    """
    share = alone
    if alone.world_size == 1:
        for rank, size, local_rank in MPI_NAMES:
            if rank in environment and size in environment:
                local = int(environment.get(local_rank, environment[rank]))
                share = Share(int(environment[rank]), int(environment[size]), local)
                break
    if f"{ARRAY}ID" not in environment:
        return share
    needed = [f"{ARRAY}{name}" for name in ("ID", "MIN", "MAX", "COUNT")]
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ValueError(f"{ARRAY}ID is set but {', '.join(missing)} is not")
    number, first, last, count = (int(environment[name]) for name in needed)
    if last - first + 1 != count:
        raise ValueError(
            f"a job array of {count} tasks from {first} to {last} has gaps, so its tasks cannot "
            "share the work; submit --array=0-N (finished shards are skipped)"
        )
    return Share(
        (number - first) * share.world_size + share.rank,
        count * share.world_size,
        share.local_rank,
    )
