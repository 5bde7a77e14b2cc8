"""Loss and full gradients of one stage on any layout, for comparison between layouts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.stages import build_stage
from megatron_kosmosg.training.optimizer import build_optimizer
from megatron_kosmosg.training.step import _run_schedule, connect
from megatron_kosmosg.training.wrapping import unwrap_model, wrap_model
from tests.tiny_models import random_batch

ROW_LENGTH = 13
Shard = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]
"""(checkpoint key, global shape, offset in it, gradient); NumPy travels between processes whole."""


def micro_batches(config: RunConfig, layout: Layout) -> Iterator[dict[str, torch.Tensor]]:
    """This replica's share of one global batch that does not depend on the layout."""
    size = config.training.micro_batch_size
    for index in range(num_microbatches(config, layout.dp_size)):
        yield random_batch(
            config.stage, size, ROW_LENGTH, seed=index * layout.dp_size + layout.dp_rank
        )


def stage_gradients(
    config: RunConfig,
) -> tuple[float, list[Shard]]:
    """(reported loss sum on the last stage else 0, [(key, global shape, offset, gradient shard)]).

    Runs the real schedule, data-parallel reduction and normalisation of one training step.
    """
    layout = platform.initialize(config)
    try:
        stage = build_stage(config, layout)
        chunks = wrap_model(stage.build_model(layout), config)
        optimizer = build_optimizer(config, chunks)
        connect(chunks, optimizer)
        for chunk in chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        losses = _run_schedule(
            stage, config, layout, chunks, [micro_batches(config, layout)], forward_only=False
        )
        total = sum(float(report["loss"][0]) for report in losses)
        return total, _gradient_shards(unwrap_model(chunks)[0])
    finally:
        platform.teardown()


def _gradient_shards(model: torch.nn.Module) -> list[Shard]:
    gradients = {
        parameter.data_ptr(): parameter.main_grad
        for parameter in model.parameters()
        if parameter.requires_grad
    }
    shards = []
    for shard in nested_values(model.sharded_state_dict()):
        if not isinstance(shard, ShardedTensor) or shard.data.data_ptr() not in gradients:
            continue
        gradient = gradients[shard.data.data_ptr()].detach()
        shards.append(
            (
                shard.key,
                shard.global_shape,
                shard.global_offset,
                gradient.view(shard.data.shape).cpu().numpy(),
            )
        )
    return shards


def assemble(shards: list[Shard]) -> dict[str, torch.Tensor]:
    """Full gradients by checkpoint key; copies of one region on several ranks must agree."""
    full: dict[str, torch.Tensor] = {}
    for key, global_shape, offset, gradient in shards:
        whole = full.setdefault(key, torch.full(global_shape, float("nan")))
        axes = len(global_shape) - gradient.ndim
        data = torch.from_numpy(gradient).reshape((1,) * axes + tuple(gradient.shape))
        region = tuple(
            slice(start, min(start + size, end))
            for start, size, end in zip(offset, data.shape, global_shape, strict=True)
        )
        data = data[tuple(slice(0, part.stop - part.start) for part in region)]
        known = whole[region]
        if not torch.isnan(known).any():
            torch.testing.assert_close(known, data, rtol=0, atol=1e-5 * float(known.abs().max()))
        whole[region] = data
    return full
