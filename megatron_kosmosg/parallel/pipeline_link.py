"""What pipeline stages send each other, without the host waiting for its device.

Megatron-Core sends the shape of each tensor ahead of it through the device and reads it there:
two to three times a micro-batch the host waits until its device has done all that it was given.
Here shapes go from host to host, and the tensors follow in the device's own order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_kosmosg.parallel.context import ParallelContext

_NUM_DIMENSIONS = 3
"""Of all that pipeline stages send each other: (sequence, batch, hidden)."""
_FORWARD, _BACKWARD = 0, 1
"""Tags: of two pipeline stages each is the one before and the one behind the other."""


class PipelineLink(P2PCommunicator):
    """Megatron-Core's exchange between neighbouring pipeline stages with shapes on the host."""

    def __init__(self, context: ParallelContext, config: ModelParallelConfig) -> None:
        super().__init__(pp_group=context.process_groups.pp, config=config)
        self._host_group = context.pp_host_group

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """(shape that the stage before sends, shape that the stage behind sends); zeros where
        nothing is received. The arguments are named as by Megatron-Core, which calls this."""
        group = self._host_group
        works, from_prev, from_next = [], _no_shape(), _no_shape()
        # Kept until they have left: the messages are read from these.
        to_prev, to_next = _shape(tensor_send_prev), _shape(tensor_send_next)
        if to_prev is not None:
            works.append(dist.isend(to_prev, self.prev_rank, group=group, tag=_BACKWARD))
        if to_next is not None:
            works.append(dist.isend(to_next, self.next_rank, group=group, tag=_FORWARD))
        if recv_prev:
            works.append(dist.irecv(from_prev, self.prev_rank, group=group, tag=_FORWARD))
        if recv_next:
            works.append(dist.irecv(from_next, self.next_rank, group=group, tag=_BACKWARD))
        for work in works:
            if work is not None:  # as it would be outside the group
                work.wait()
        return from_prev.tolist(), from_next.tolist()


def pipeline_schedule(context: ParallelContext, config: ModelParallelConfig) -> Callable[..., list]:
    """Megatron-Core's schedule for the layout, over our links; arguments as of its schedules.

    Args:
        config: of the model, or of a pipeline stage's first chunk.
    """
    schedule = get_forward_backward_func()
    if context.pp_size == 1:
        return schedule
    link = PipelineLink(context, config)
    return partial(schedule, p2p_communicator=link, pg_collection=context.process_groups)


def _shape(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else torch.tensor(tensor.shape, dtype=torch.int64)


def _no_shape() -> torch.Tensor:
    return torch.zeros(_NUM_DIMENSIONS, dtype=torch.int64)
