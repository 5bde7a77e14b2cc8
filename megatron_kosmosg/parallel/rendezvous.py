"""How the processes of a job meet, each at the place that launcher.py found for it.

Under Slurm one `srun` task is one rank, so no torchrun agent stands between a signal and training.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.launcher import Place, attempt

if TYPE_CHECKING:
    import torch


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
    return torch.distributed.PrefixStore(f"attempt {attempt()}", store)
