"""Loss and full gradients of one stage on any layout, for comparison between layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.stages import build_stage
from megatron_kosmosg.training.optimizer import build_optimizer
from megatron_kosmosg.training.stage import Stage
from megatron_kosmosg.training.step import _run_schedule, configure_schedules
from megatron_kosmosg.training.wrapping import wrap_model
from tests.support.shares import Share, gradients, unwrap_model
from tests.support.tiny_models import random_batch

ROW_LENGTH = 13


def micro_batches(config: RunConfig, context: ParallelContext) -> Iterator[dict[str, torch.Tensor]]:
    """This replica's share of one global batch that does not depend on the layout, on its device
    as a stage gets it."""
    size = config.training.micro_batch_size
    for index in range(num_microbatches(config, context.dp_size)):
        seed = index * context.dp_size + context.dp_rank
        batch = random_batch(config.stage, size, ROW_LENGTH, seed=seed)
        if config.data.pack_prompts:
            batch["packed"] = (~batch["padding_mask"]).flatten().nonzero().flatten()
        yield {name: value.to(context.device) for name, value in batch.items()}


def prompts_alone(config: RunConfig, context: ParallelContext) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of `micro_batches` of one rank, each a micro-batch of its own without padding."""
    for batch in micro_batches(config, context):
        for row, mask in enumerate(batch["padding_mask"]):
            length = int((~mask).sum())
            yield {
                name: value
                if name == "pixel_values"
                else value[row : row + 1, :length]
                if name in ("tokens", "image_mask", "padding_mask")
                else value[row : row + 1]
                for name, value in batch.items()
            }


def stage_gradients(config: RunConfig, *, alone: bool = False) -> tuple[float, Share]:
    """(reported loss sum on the last pipeline stage, else 0, this rank's gradients) of one global
    batch.

    alone: of `align` on one rank, every prompt in a micro-batch of its own.
    """
    context = platform.initialize(config)
    try:
        stage = build_stage(config, context)
        batches = micro_batches(config, context)
        if alone:
            batches = prompts_alone(config, context)
            rows = config.training.global_batch_size
            training = dataclasses.replace(config.training, micro_batch_size=1)
            config = dataclasses.replace(config, training=training)
            assert num_microbatches(config, context.dp_size) == rows
        reports, model = run_step(stage, config, context, batches)
        return sum(float(report["loss"][0]) for report in reports), gradients(model, context)
    finally:
        platform.teardown()


def run_step(
    stage: Stage,
    config: RunConfig,
    context: ParallelContext,
    batches: Iterator[dict[str, torch.Tensor]],
) -> tuple[list[dict[str, torch.Tensor]], KosmosG]:
    """(reports of the micro-batches, the model with its gradients) of one training step."""
    reports, _, model = train_pass(stage, config, context, batches)
    return reports, model


def train_pass(
    stage: Stage,
    config: RunConfig,
    context: ParallelContext,
    batches: Iterator[dict[str, torch.Tensor]],
) -> tuple[list[dict[str, torch.Tensor]], list[DistributedDataParallel], KosmosG]:
    """(reports of the micro-batches, the wrapped chunks, the model with its gradients).

    Runs the real schedule, data-parallel reduction and normalisation.
    """
    chunks = wrap_model(stage.build_model(context), config)
    configure_schedules(chunks, build_optimizer(config, chunks), stage.remote_score)
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    reports = _run_schedule(stage, config, context, chunks, [batches], forward_only=False)
    return reports, chunks, unwrap_model(chunks)[0]
