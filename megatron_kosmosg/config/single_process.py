"""The same model whole on one rank, whatever layout its run was trained with."""

from __future__ import annotations

import dataclasses

from megatron_kosmosg.config.schema import ParallelConfig, RunConfig


def single_process_config(config: RunConfig) -> RunConfig:
    """The config without model parallelism and with the U-Net beside the decoder."""
    score = dataclasses.replace(config.score, placement="colocated")
    return dataclasses.replace(config, parallel=ParallelConfig(), score=score)
