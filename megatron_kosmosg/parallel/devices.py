"""Which device a process uses: its GPU where there is one, otherwise the CPU."""

from __future__ import annotations

import torch

from megatron_kosmosg.parallel.rendezvous import Place


def choose_device(place: Place) -> torch.device:
    """The GPU of this rank (made current) or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Slurm may show each task one GPU only, which is then number 0.
    chosen = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(chosen)
    return chosen


def collective_backend(device: torch.device) -> str:
    """Of torch.distributed, for tensors on this device."""
    return "nccl" if device.type == "cuda" else "gloo"
