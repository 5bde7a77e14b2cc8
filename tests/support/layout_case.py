"""One training step of a tiny model on a given layout, and what must not depend on the layout.

The step goes through Megatron-Core's stock schedule over our links, its DDP wrapper and
finalize_model_grads. The loss is simple but touches every output; the sizes are awkward (odd
vocabulary, odd number of decoder layers and of queries), and sequence length and number of images
vary by micro-batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module

from megatron_kosmosg.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron_kosmosg.models.chunks import agree_on_freezing
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.pipeline_link import pipeline_schedule
from megatron_kosmosg.score.row_split import sum_over_tensor_ranks, take_rows
from tests.support.shares import gradients
from tests.support.tiny_models import (
    CONDITION_WIDTH,
    HIDDEN_SIZE,
    NUM_LATENT_QUERIES,
    NUM_QUERIES,
    VOCAB_SIZE,
    model_config,
)

LENGTHS = (15, 12, 9, 14)
"""Tokens per row of each micro-batch; none divides by every tensor-parallel size."""


@dataclass(frozen=True)
class Case:
    """A layout and what is built and trained on it."""

    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    pipeline_layout: str | None = None
    output_head: bool = False
    aligner_parts: tuple[str, ...] = ()
    frozen: bool = False
    """Only AlignerNet trains, as in `align`."""
    split_rows: bool = False
    """Each tensor-parallel rank computes the loss of its rows only, as `instruct` does."""
    recompute: str = "none"
    aligner_kind: str = "full"
    precision: str = "fp32"

    def config(self) -> RunConfig:
        """The run's config."""
        return RunConfig(
            stage="pretrain",
            model=model_config(self.aligner_kind),
            parallel=ParallelConfig(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                sequence_parallel=self.sequence_parallel,
                pipeline_layout=self.pipeline_layout,
                timeout_seconds=60,
            ),
            training=TrainingConfig(precision=self.precision, recompute=self.recompute, seed=5),
        )


def micro_batch(index: int) -> dict[str, torch.Tensor]:
    """Three rows: two images, text and padding, one image; index 2 has no image at all."""
    generator = torch.Generator().manual_seed(100 + index)
    length = LENGTHS[index]
    tokens = torch.randint(4, VOCAB_SIZE, (3, length), generator=generator)
    image_mask = torch.zeros(3, length, dtype=torch.bool)
    if index != 2:
        for row, start in ((0, 1), (2, 3)):
            image_mask[row, start : start + NUM_LATENT_QUERIES] = True
    padding_mask = torch.zeros(3, length, dtype=torch.bool)
    padding_mask[1, length - 4 :] = True
    tokens[padding_mask] = 1
    num_images = 0 if index == 2 else 2
    return {
        "tokens": tokens,
        "image_mask": image_mask,
        "padding_mask": padding_mask,
        "pixel_values": torch.randn(num_images, 3, 28, 28, generator=generator),
        "labels": torch.randint(4, VOCAB_SIZE, (3, length), generator=generator),
        "target": torch.randn(3, NUM_QUERIES, CONDITION_WIDTH, generator=generator),
        "probe": torch.randn(3, length, HIDDEN_SIZE, generator=generator),
    }


def build(case: Case, context: ParallelContext) -> KosmosG:
    """The model of the case on this rank."""
    model = KosmosG(
        case.config(), context, output_head=case.output_head, aligner_parts=case.aligner_parts
    )
    model.requires_grad_(not case.frozen)
    for part in (model.aligner_m, model.aligner_n):
        if part is not None:
            part.requires_grad_(True)
    if model.vision_encoder is not None:
        model.vision_encoder.requires_grad_(False)
        if not case.frozen:
            for module in model.trainable_vision_modules():
                module.requires_grad_(True)
    agree_on_freezing([model], context)
    return model


def train_step(case: Case) -> dict:
    """Loss, outputs and gradients (this rank's share) of one step on this rank."""
    context = platform.initialize(case.config())
    try:
        return _train_step(case, context)
    finally:
        platform.teardown()


def _train_step(case: Case, context: ParallelContext) -> dict:
    model = build(case, context)
    half = case.precision != "fp32"
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(use_distributed_optimizer=False, grad_reduce_in_fp32=True),
        Float16Module(model.config, model) if half else model,
        disable_bucketing=True,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    indices = range(len(LENGTHS))[context.dp_rank :: context.dp_size]
    outputs: list[dict[str, torch.Tensor]] = []

    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        output = model(
            batch["tokens"], batch["image_mask"], batch["padding_mask"], batch["pixel_values"]
        )

        def loss_func(output):
            outputs.append(complete_outputs(output, context))
            output = {key: value.float() for key, value in output.items()}
            loss = _loss(case, output, batch, context)
            return loss, torch.tensor(3, dtype=torch.int), {"loss": loss.detach()}

        return output, loss_func

    losses = pipeline_schedule(context, model.config)(
        forward_step_func=forward_step,
        data_iterator=iter([micro_batch(index) for index in indices]),
        model=[wrapped],
        num_microbatches=len(indices),
        seq_length=max(LENGTHS),
        micro_batch_size=3,
        forward_only=False,
    )
    return {
        "tp_rank": context.tp_rank,
        "dp_rank": context.dp_rank,
        "loss": float(sum(entry["loss"] for entry in losses)) if losses else None,
        "outputs": [{k: v.float().numpy() for k, v in output.items()} for output in outputs],
        "gradients": gradients(model, context),
    }


def _loss(case: Case, output: dict, batch: dict, context: ParallelContext) -> torch.Tensor:
    loss = (output["hidden"] * batch["probe"]).sum() * (0.01 if not case.frozen else 0)
    if "logits" in output:
        losses = tensor_parallel.vocab_parallel_cross_entropy(
            output["logits"].float().clone(), batch["labels"].T.contiguous()
        )
        loss = loss + losses.sum()
    if "condition" in output:
        condition, target = output["condition"], batch["target"]
        if case.split_rows:
            rows = take_rows(condition, context)
            part = (rows - take_rows(target, context)).square().sum()
            loss = loss + sum_over_tensor_ranks(part, context)
        else:
            loss = loss + (condition - target).square().sum()
    if "reconstruction" in output:
        loss = loss + (output["reconstruction"] - output["hidden"]).square().sum() * 0.1
    return loss


def complete_outputs(output: dict, context: ParallelContext) -> dict[str, torch.Tensor]:
    """The model's outputs, detached, the logits with all ranks' shares of the vocabulary."""
    complete = {key: value.detach() for key, value in output.items()}
    if "logits" in complete and context.tp_size > 1:
        shards = [torch.empty_like(complete["logits"]) for _ in range(context.tp_size)]
        torch.distributed.all_gather(shards, complete["logits"].contiguous(), context.tp_group)
        complete["logits"] = torch.cat(shards, dim=-1)
    return complete


def single_process_config(case: Case) -> Case:
    """The same model and loss without any parallelism."""
    return dataclasses.replace(
        case, tp=1, pp=1, sequence_parallel=False, pipeline_layout=None, recompute="none"
    )
