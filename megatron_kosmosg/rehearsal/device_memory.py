"""Bytes of tensors that are alive on the device, and which host memory is pinned."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

_GRANULARITY = 512
"""Bytes; torch's caching allocator hands out multiples."""


class DeviceMemory:
    """Every storage on the device that was shown to it, until the storage is freed."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        """Bytes; `peak` since the last `restart_peak`."""
        self._highest = 0
        self._alive: dict[int, weakref.ref] = {}
        self._pinned: dict[int, weakref.ref] = {}

    def see(self, value: torch.Tensor) -> int:
        """Bytes of the tensor's storage, counted from now on, if it is new and on the device."""
        if value.device.type != "cuda":
            return 0
        storage = value.untyped_storage()
        key, size = storage._cdata, _rounded(storage.nbytes())
        if key in self._alive or not size:
            return 0

        def freed(_: weakref.ref) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
        self._highest = max(self._highest, self.now)
        return size

    def see_all(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts what no operator returned: parameters whose data were put in place."""
        for tensor in tensors:
            self.see(tensor.data)

    def size(self, tensors: Iterable[torch.Tensor]) -> int:
        """Bytes of the storages in which they lie, each counted once."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        return sum(_rounded(storage.nbytes()) for storage in storages.values())

    def restart_peak(self) -> None:
        self.peak = self.now

    def take_highest(self) -> int:
        """The most bytes that were alive at once since the last call."""
        highest, self._highest = self._highest, self.now
        return highest

    def pin(self, value: torch.Tensor) -> None:
        """Notes that a tensor on the host lies in pinned memory."""
        storage = value.untyped_storage()
        key = storage._cdata
        self._pinned[key] = weakref.ref(storage, lambda _: self._pinned.pop(key, None))

    def is_pinned(self, value: torch.Tensor) -> bool:
        return value.untyped_storage()._cdata in self._pinned


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // _GRANULARITY) * _GRANULARITY
