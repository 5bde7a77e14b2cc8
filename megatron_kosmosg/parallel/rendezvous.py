"""How a process learns its rank and meets the others: torchrun, Slurm, or alone.

Under Slurm one `srun` task is one rank, so no torchrun agent stands between a signal and training.
Who one is can be asked without torch: a wrong setting is refused before it is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_kosmosg.config.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """Rank of this process, where it sits on its node, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    address: str | None
    """Host of rank 0; None for a process alone."""
    port: int | None


def find_place(environment: Mapping[str, str]) -> Place:
    """This process's place according to torchrun's variables, else Slurm's, else alone."""
    if "RANK" in environment:
        missing = {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - environment.keys()
        if missing:
            raise ConfigError(
                f"RANK is set but {', '.join(sorted(missing))} is not; start ranks with torchrun "
                "or srun, or unset RANK to run alone"
            )
        return Place(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            address=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
        )
    # srun sets the step's variables; sbatch and salloc alone set only the job's.
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        step = f"{environment['SLURM_JOB_ID']}{environment.get('SLURM_STEP_ID', '0')}"
        return Place(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            address=environment.get("MASTER_ADDR")
            or first_host(environment["SLURM_STEP_NODELIST"]),
            port=int(environment.get("MASTER_PORT", 10000 + int(step) % 20000)),
        )
    return Place(rank=0, world_size=1, local_rank=0, address=None, port=None)


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: "gpu[007-009,12],cpu1" -> "gpu007"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", node_list)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={node_list!r} cannot be read; set MASTER_ADDR")
    prefix, first, suffix = match.groups()
    return prefix + (first or "") + (suffix or "")


def meet(place: Place, timeout: timedelta) -> torch.distributed.Store:
    """The store that all ranks of the job share. Raises ConfigError when rank 0 cannot be met."""
    import torch

    if place.address is None:
        return torch.distributed.HashStore()  # alone: no socket, no port
    try:
        met = torch.distributed.rendezvous(
            f"tcp://{place.address}:{place.port}", place.rank, place.world_size, timeout=timeout
        )
        store, _, _ = next(iter(met))
    except torch.distributed.DistNetworkError as error:
        taken = "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()
        reason = (
            f"port {place.port} on {place.address} is in use by another program"
            if taken
            else f"rank {place.rank} could not reach rank 0 at {place.address}:{place.port}"
        )
        raise ConfigError(
            f"{reason}; choose a free one with torchrun --master-port or MASTER_PORT"
        ) from error
    store.set_timeout(timeout)
    return store


def connect(place: Place, timeout: timedelta) -> torch.distributed.Store:
    """A further connection to the store that `meet` gives, so that waiting here holds up nobody."""
    import torch

    if place.address is None:
        return torch.distributed.HashStore()
    assert place.port is not None
    store = torch.distributed.TCPStore(
        place.address, place.port, is_master=False, timeout=timeout, wait_for_workers=False
    )
    # torchrun's store outlives ranks that it starts again; what the former ones said is stale.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.PrefixStore(f"attempt {attempt}", store)
