"""Batch arithmetic: how ranks, micro-batches and the global batch fit together."""

from __future__ import annotations

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.rank_grid import neighbours, rank_grid
from megatron_kosmosg.config.schema import RunConfig


def model_parallel_size(config: RunConfig) -> int:
    """Ranks that hold one copy of the model: tensor x pipeline."""
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Decoder replicas among `world_size` ranks; ranks of the U-Net alone are none."""
    return rank_grid(config, world_size).num_replicas


def num_microbatches(config: RunConfig, dp_size: int) -> int:
    """Forward passes of one replica per optimizer update."""
    training = config.training
    unit = training.micro_batch_size * dp_size
    if training.global_batch_size % unit:
        nearest = neighbours(training.global_batch_size, unit)
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} must be a multiple of "
            f"training.micro_batch_size ({training.micro_batch_size}) x data-parallel size "
            f"({dp_size}) = {unit}; set training.global_batch_size to {nearest}"
        )
    return training.global_batch_size // unit
