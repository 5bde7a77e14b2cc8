"""Copies from the host to the device that nobody waits for.

On a GPU such a copy needs pinned memory: from any other the program waits until it is done. On a
CPU there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_kosmosg.parallel.devices import has_stream


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The CPU tensor where `device` can read it by itself."""
    return tensor.pin_memory() if has_stream(device) else tensor


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The CPU tensor on `device`; what comes after it there finds it whole."""
    return pinned(tensor, device).to(device, non_blocking=True)


def upload_numbers(
    numbers: Sequence[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[n] on `device`."""
    return upload(torch.tensor(numbers, dtype=dtype), device)
