"""One process that stands for any rank of a large run: real process groups that carry nothing.

Models built in it are real shards on the meta device: right shapes, no memory, no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_kosmosg.config.rank_grid import RankGrid
from megatron_kosmosg.parallel.context import ParallelContext

_BACKEND = "fake"


@contextmanager
def pretend_rank(world: RankGrid, rank: int) -> Iterator[ParallelContext]:
    """The layout of decoder rank `rank` of `world`, on the meta device, while the block runs.

    Needs a process without torch.distributed. Only the groups that the rank is in are made.
    """
    coordinates = world.coordinates(rank)
    if coordinates.role != "decoder":
        raise ValueError(f"rank {rank} is a score rank; only decoder ranks have groups")
    torch.distributed.init_process_group(
        _BACKEND, store=FakeStore(), rank=rank, world_size=world.world_size
    )
    try:
        context = _context(world, rank)
        # Two things ask Megatron's global state, not the groups: a pipeline layout for its pipeline
        # stage, and cross-attention's linears for the ranks that split them. Without it (its sign
        # is the data group) those linears are built whole, without an error.
        parallel_state.set_pipeline_model_parallel_rank(coordinates.pp_rank)
        parallel_state.set_pipeline_model_parallel_world_size(world.pp_size)
        parallel_state._TENSOR_MODEL_PARALLEL_GROUP = context.tp_group
        parallel_state._DATA_PARALLEL_GROUP = context.dp_group
        yield context
    finally:
        parallel_state._DATA_PARALLEL_GROUP = None
        parallel_state._TENSOR_MODEL_PARALLEL_GROUP = None
        parallel_state.set_pipeline_model_parallel_rank(None)
        parallel_state.set_pipeline_model_parallel_world_size(None)
        torch.distributed.destroy_process_group()


def _context(world: RankGrid, rank: int) -> ParallelContext:
    coordinates = world.coordinates(rank)
    pipeline = world.pipeline_group(coordinates.replica, coordinates.tp_rank)
    ends = sorted({pipeline[0], pipeline[-1]})
    tensor, pipeline_group, data, alone = (
        # Without the cast it might be a number, which stands for a group that this rank is not in.
        cast(ProcessGroup, torch.distributed.new_group(ranks, backend=_BACKEND))
        for ranks in (
            world.tensor_group(coordinates.replica, coordinates.pp_rank),
            pipeline,
            world.data_group(coordinates.pp_rank, coordinates.tp_rank),
            [rank],
        )
    )
    tied = torch.distributed.new_group(ends, backend=_BACKEND) if rank in ends else None
    return ParallelContext(
        world_size=world.world_size,
        rank=rank,
        tp_rank=coordinates.tp_rank,
        tp_size=world.tp_size,
        pp_rank=coordinates.pp_rank,
        pp_size=world.pp_size,
        dp_rank=coordinates.replica,
        dp_size=world.num_replicas,
        tp_group=tensor,
        pp_group=pipeline_group,
        dp_group=data,
        process_groups=ProcessGroupCollection(
            tp=tensor, pp=pipeline_group, cp=alone, dp=data, dp_cp=data, embd=tied, pos_embd=None
        ),
        device=torch.device("meta"),
    )
