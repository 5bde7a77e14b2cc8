"""How the processes of a job meet, each at the place that launcher.py found for it.

Under Slurm one `srun` task is one rank, so no torchrun agent stands between a signal and training.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.launcher import RankInfo, attempt, has_agent

if TYPE_CHECKING:
    import torch


def meet(rank_info: RankInfo, timeout: timedelta) -> torch.distributed.Store:
    """The store that all ranks of the job share. Raises ConfigError when rank 0 cannot be met."""
    import torch

    if rank_info.address is None:
        return torch.distributed.HashStore()  # alone: no socket, no port
    assert rank_info.port is not None
    try:
        listener = _listener(rank_info)
        if listener is None:
            met = torch.distributed.rendezvous(
                f"tcp://{rank_info.address}:{rank_info.port}",
                rank_info.rank,
                rank_info.world_size,
                timeout=timeout,
            )
            store, _, _ = next(iter(met))
        else:
            store = torch.distributed.TCPStore(
                rank_info.address,
                rank_info.port,
                rank_info.world_size,
                is_master=True,
                timeout=timeout,
                master_listen_fd=listener,
            )
    except (torch.distributed.DistNetworkError, OSError) as error:
        taken = "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()
        host, port = rank_info.address, rank_info.port
        reason = (
            f"port {port} on {host} is in use by another program"
            if taken
            else f"rank {rank_info.rank} could not reach rank 0 at {host}:{port}"
        )
        raise ConfigError(
            f"{reason}; choose a free one with torchrun --master-port or MASTER_PORT"
        ) from error
    store.set_timeout(timeout)
    return of_attempt(store)


def _listener(rank_info: RankInfo) -> int | None:
    """A socket for rank 0's store, bound to the one address that is meant; None: torch makes one.

    torch's listens on all interfaces. That is kept where an agent has the store, and for a host
    name: rank 0 may resolve its own name to another address than the other nodes do.
    """
    if rank_info.rank != 0 or has_agent():
        return None
    if rank_info.listener is not None:
        return rank_info.listener
    try:
        named = "127.0.0.1" if rank_info.address == "localhost" else rank_info.address
        address = ipaddress.ip_address(str(named))
    except ValueError:
        return None
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((str(address), rank_info.port))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return None  # in a container whose host has that address
        # Not as many as there are ranks: each asks several times before the store takes the socket,
        # and who finds the queue full waits for seconds.
        made.listen(socket.SOMAXCONN)
        return made.detach()


def connect_to_store(rank_info: RankInfo, timeout: timedelta) -> torch.distributed.Store:
    """A further connection to the store that `meet` gives, so that waiting here holds up nobody."""
    import torch

    if rank_info.address is None:
        return torch.distributed.HashStore()
    assert rank_info.port is not None
    store = torch.distributed.TCPStore(
        rank_info.address, rank_info.port, is_master=False, timeout=timeout, wait_for_workers=False
    )
    return of_attempt(store)


def of_attempt(store: torch.distributed.Store) -> torch.distributed.Store:
    """The part of a store in which nothing stands of an earlier start of the same ranks, as
    torchrun's store outlives ranks that it starts again."""
    import torch

    return torch.distributed.PrefixStore(f"attempt {attempt()}", store)
