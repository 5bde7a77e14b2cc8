"""Which rank does what: the tensor-, pipeline- and data-parallel coordinates and groups."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup, Store

from megatron_kosmosg.config.batching import data_parallel_size
from megatron_kosmosg.config.schema import ParallelConfig, RunConfig


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place. A group is None in a process without torch.distributed."""

    world_size: int
    rank: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: ProcessGroup | None
    pp_group: ProcessGroup | None
    dp_group: ProcessGroup | None
    process_groups: ProcessGroupCollection
    """The same and more, in the form that Megatron-Core modules take."""
    device: torch.device
    pp_host_group: ProcessGroup | None = None
    """The ranks of `pp_group`, for tensors in the hosts' memory."""
    num_score_ranks: int = 0
    """Ranks of the whole run that hold the U-Net alone; `world_size` does not count them."""
    store: Store | None = None
    """Where all ranks of the run meet, score ranks included."""

    @property
    def num_devices(self) -> int:
        """Number of all ranks of the run, score ranks included."""
        return self.world_size + self.num_score_ranks

    @property
    def canonical_rank(self) -> int:
        """This rank's number where tensor ranks are adjacent, then replicas, then pipeline stages;
        `rank` counts otherwise where replicas have score ranks."""
        return self.tp_rank + self.tp_size * (self.dp_rank + self.dp_size * self.pp_rank)

    @property
    def is_first_pipeline_stage(self) -> bool:
        """Whether this rank embeds tokens and images."""
        return self.pp_rank == 0

    @property
    def is_last_pipeline_stage(self) -> bool:
        """Whether this rank is in the last pipeline stage, which computes the loss."""
        return self.pp_rank == self.pp_size - 1


def create_groups(
    config: RunConfig,
    device: torch.device,
    num_score_ranks: int = 0,
    store: Store | None = None,
) -> ParallelContext:
    """Megatron's groups over torch.distributed's world, which holds the decoder ranks alone.

    Tensor-parallel ranks are adjacent. Raises ConfigError if the ranks do not divide into copies of
    the model.
    """
    data_parallel_size(config, torch.distributed.get_world_size() + num_score_ranks)
    parallel: ParallelConfig = config.parallel
    minutes = timedelta(seconds=parallel.timeout_seconds).total_seconds() / 60
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=cast(int, minutes),  # annotated so, and takes parts of one
        # config/rank_grid.py keeps the pipeline stages of a replica together where it has score
        # ranks.
        order="tp-cp-ep-pp-dp" if num_score_ranks else "tp-cp-ep-dp-pp",
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return ParallelContext(
        world_size=torch.distributed.get_world_size(),
        rank=torch.distributed.get_rank(),
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        pp_rank=groups.pp.rank(),
        pp_size=groups.pp.size(),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        tp_group=groups.tp,
        pp_group=groups.pp,
        pp_host_group=_host_group(groups.pp, device, parallel.timeout_seconds),
        dp_group=groups.dp,
        process_groups=groups,
        device=device,
        num_score_ranks=num_score_ranks,
        store=store,
    )


def _host_group(group: ProcessGroup, device: torch.device, timeout_seconds: float) -> ProcessGroup:
    """The same ranks over gloo, unless they talk through it anyway."""
    if device.type == "cpu" or group.size() == 1:
        return group
    hosts = torch.distributed.new_group(
        torch.distributed.get_process_group_ranks(group),
        timeout=timedelta(seconds=timeout_seconds),
        backend="gloo",
        # Only these ranks know of it: no rank waits for the other pipelines.
        use_local_synchronization=True,
        group_desc="pipeline of hosts",
    )
    return cast(ProcessGroup, hosts)  # a number would be a group that this rank is not in


def single_process_context(device: torch.device | str) -> ParallelContext:
    """A layout of one process without torch.distributed, to build (not train) the whole model."""
    groups = ProcessGroupCollection(
        tp=None, pp=None, cp=None, dp=None, dp_cp=None, embd=None, pos_embd=None
    )
    return ParallelContext(
        world_size=1, rank=0, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1,
        tp_group=None, pp_group=None, dp_group=None, process_groups=groups,
        device=torch.device(device),
    )  # fmt: skip


def destroy_groups() -> None:
    """Makes Megatron-Core forget its process groups and buffers."""
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
