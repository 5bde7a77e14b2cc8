"""Who is missing while ranks wait for each other at the start.

The store of the rendezvous waits for all ranks and says of none that it has not come. Each rank
that has met it leaves a sign there; a thread beside rank 0's wait says who has left none. Beside
the wait of another rank, one says that rank 0 is not there.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_kosmosg.launcher import RankInfo
from megatron_kosmosg.parallel.rendezvous import connect_to_store

if TYPE_CHECKING:
    from torch.distributed import Store

SECONDS = 25.0
"""Without all of them, before the first word; then after each time as long again."""
_NAMED = 8
_TRY = timedelta(seconds=5)
_END = 2.0
"""Seconds for the thread to end, which takes as long only where nobody answers it."""


class Arrivals:
    """Context manager around the first wait of one rank, which ends with `sign`."""

    def __init__(self, rank_info: RankInfo, seconds: float = SECONDS) -> None:
        self._rank_info, self._seconds = rank_info, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="arrivals", daemon=True)

    def __enter__(self) -> Arrivals:
        if self._rank_info.address is not None and self._rank_info.world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            # A process that ends while a thread is inside torch is aborted, whatever its code was.
            self._thread.join(_END)

    def sign(self, store: Store) -> None:
        """Says on the store that `meet` gave that this rank has come."""
        store.set(_key(self._rank_info.rank), "here")

    def _watch(self) -> None:
        started, spoken = time.monotonic(), 0
        missing: list[int] | None = None
        while True:
            try:
                _knock(self._rank_info)
                store = connect_to_store(self._rank_info, _TRY)
                if self._rank_info.rank != 0:
                    return
                others = range(1, self._rank_info.world_size)
                missing = [rank for rank in others if not store.check([_key(rank)])]
                if not missing:
                    return
            except (RuntimeError, OSError):  # rank 0 listens later, or has given up
                missing = [0] if self._rank_info.rank != 0 else missing
            waited = time.monotonic() - started
            if waited >= self._seconds * (spoken + 1) and missing and not self._ended.is_set():
                spoken += 1
                if self._rank_info.local_rank == 0:
                    self._log(missing, waited)
            if self._ended.wait(min(1.0, self._seconds / 4)):
                return

    def _log(self, missing: list[int], waited: float) -> None:
        several = "s" if len(missing) > 1 else ""
        names = ", ".join(map(str, missing[:_NAMED]))
        more = len(missing) - _NAMED
        rank_info = self._rank_info
        print(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank_info.rank} has waited {waited:.0f} s "
            f"at {rank_info.address}:{rank_info.port} for rank{several} {names}"
            f"{f' and {more} more' if more > 0 else ''} of {rank_info.world_size}; was one process "
            "started for each?",
            file=sys.stderr,
            flush=True,
        )


def _knock(rank_info: RankInfo) -> None:
    """Raises OSError where nobody listens. A store's client would try for seconds, then rest for
    seconds before it says so."""
    socket.create_connection((rank_info.address or "", rank_info.port or 0), timeout=1).close()


def _key(rank: int) -> str:
    return f"kosmosg/arrived/{rank}"
