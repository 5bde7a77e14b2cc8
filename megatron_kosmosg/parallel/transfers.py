"""Copies between the host and the device that nobody waits for.

On a GPU such a copy needs pinned memory: from any other the program waits until it is done. On a
CPU there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_kosmosg.parallel.devices import has_stream


def pinned(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors where `device` can read them by itself; for the threads that read. Images that
    were decoded on the device stay there."""
    if not has_stream(device):
        return batch
    return {
        name: values if has_stream(values.device) else values.pin_memory()
        for name, values in batch.items()
    }


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; what comes after it there finds it whole."""
    if has_stream(device) and values.device.type == "cpu" and not values.is_pinned():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def upload_numbers(
    numbers: Sequence[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The numbers as a tensor [n] on `device`; nobody waits for the copy."""
    return upload(torch.tensor(numbers, dtype=dtype), device)


class Download:
    """Copies of tensors on the host, whole when they `has_arrived`."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors: list[torch.Tensor] = []
        self._event: torch.cuda.Event | None = None
        for tensor in tensors:
            on_device = has_stream(tensor.device)
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
            self.tensors.append(copy.copy_(tensor, non_blocking=True))
            if on_device:
                self._event = torch.cuda.Event()
        if self._event is not None:
            self._event.record()

    def has_arrived(self) -> bool:
        """Whether all of the tensors are on the host; any thread may ask."""
        return self._event is None or self._event.query()
