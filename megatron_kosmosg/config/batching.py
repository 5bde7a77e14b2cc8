"""Batch arithmetic: how ranks, micro-batches and the global batch fit together."""

from __future__ import annotations

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig


def model_parallel_size(config: RunConfig) -> int:
    """Ranks that hold one copy of the model: tensor x pipeline."""
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Copies of the model among `world_size` ranks (the U-Net sits on the same ranks)."""
    ranks = model_parallel_size(config)
    if world_size % ranks:
        lower = world_size // ranks * ranks
        nearest = f"{lower} or {lower + ranks}" if lower else f"{ranks}"
        raise ConfigError(
            f"{world_size} ranks cannot be split into copies of "
            f"parallel.tensor_model_parallel_size ({config.parallel.tensor_model_parallel_size}) x "
            f"parallel.pipeline_model_parallel_size "
            f"({config.parallel.pipeline_model_parallel_size}) = {ranks} ranks; "
            f"start {nearest} ranks or change the two sizes"
        )
    return world_size // ranks


def num_microbatches(config: RunConfig, dp_size: int) -> int:
    """Forward passes of one replica per optimizer update."""
    training = config.training
    unit = training.micro_batch_size * dp_size
    if training.global_batch_size % unit:
        lower = training.global_batch_size // unit * unit
        nearest = f"{lower} or {lower + unit}" if lower else f"{unit}"
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} must be a multiple of "
            f"training.micro_batch_size ({training.micro_batch_size}) x data-parallel size "
            f"({dp_size}) = {unit}; set training.global_batch_size to {nearest}"
        )
    return training.global_batch_size // unit
