"""One loader per tensor-parallel group: the rank that reads a batch hands it to the others."""

from __future__ import annotations

import torch

from megatron_kosmosg.data.samples import FOR_THE_HOST
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.transfers import upload


def broadcast_batch(
    batch: dict[str, torch.Tensor] | None, context: ParallelContext
) -> dict[str, torch.Tensor]:
    """The batch of tp_rank 0 on every rank of its tensor-parallel group, on their devices.

    Args:
        batch: tensors of any dtype and shape on tp_rank 0, on the CPU or (images) on the device;
            None elsewhere. What is for the host (samples.FOR_THE_HOST) stays on the CPU.
    """
    read = batch or {}  # by this rank itself
    if context.tp_size == 1:
        return {key: _placed(key, value, context.device) for key, value in read.items()}
    group = context.process_groups.tp
    source = torch.distributed.get_global_rank(group, 0)
    host = {key: value.clone() for key, value in read.items() if key in FOR_THE_HOST}
    shapes = [(key, v.dtype, tuple(v.shape)) for key, v in read.items() if key not in FOR_THE_HOST]
    description = [(host, shapes)]
    torch.distributed.broadcast_object_list(description, source, group=group)
    received, shapes = description[0]
    for key, dtype, shape in shapes:
        if context.tp_rank == 0:
            value = upload(read[key], context.device).contiguous()
        else:
            value = torch.empty(shape, dtype=dtype, device=context.device)
        if value.numel():
            # Backends have no boolean all over; bytes always travel.
            wire = value.view(torch.uint8) if dtype is torch.bool else value
            torch.distributed.broadcast(wire, source, group=group)
        received[key] = value
    return received


def _placed(key: str, value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return value if key in FOR_THE_HOST else upload(value, device)
