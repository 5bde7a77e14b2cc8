"""One training step of a tiny model on a given layout, and what must not depend on the layout.

The step goes through Megatron-Core's stock schedule, its DDP wrapper and finalize_model_grads. The
loss is simple but touches every output; the sizes are awkward (odd vocabulary, odd number of
decoder layers and of queries), and sequence length and number of images vary by micro-batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_kosmosg.config.schema import (
    AlignerConfig,
    DecoderConfig,
    ModelConfig,
    ParallelConfig,
    ResamplerConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_kosmosg.models.initialise import global_name, split_axis
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.parallel.rows import sum_over_tensor_ranks, take_rows

VOCAB_SIZE = 101
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


def model_config(aligner_kind: str = "full") -> ModelConfig:
    """Tiny, odd where the real one is even, and without dropout."""
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        decoder=DecoderConfig(
            num_layers=3,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            hidden_dropout=0.0,
        ),
        vision=VisionConfig(
            num_layers=2,
            hidden_size=24,
            ffn_hidden_size=40,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        resampler=ResamplerConfig(
            num_latent_queries=5, num_attention_heads=4, attention_dropout=0.0
        ),
        aligner=AlignerConfig(
            kind=aligner_kind,
            num_layers=2,
            hidden_size=20,
            ffn_hidden_size=36,
            num_attention_heads=2,
            num_queries=7,
            max_positions=40,
        ),
    )


def micro_batch(index: int) -> dict[str, torch.Tensor]:
    """Three rows: two images, text and padding, one image; index 2 has no image at all."""
    generator = torch.Generator().manual_seed(100 + index)
    length = LENGTHS[index]
    tokens = torch.randint(4, VOCAB_SIZE, (3, length), generator=generator)
    image_mask = torch.zeros(3, length, dtype=torch.bool)
    if index != 2:
        image_mask[0, 1:6] = image_mask[2, 3:8] = True
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
        "target": torch.randn(3, 7, 20, generator=generator),
        "probe": torch.randn(3, length, 32, generator=generator),
    }


def build(case: Case, layout: Layout) -> KosmosG:
    """The model of the case on this rank."""
    model = KosmosG(
        case.config(), layout, output_head=case.output_head, aligner_parts=case.aligner_parts
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
    model.agree_on_freezing()
    return model


def train_step(case: Case) -> dict:
    """Loss, outputs and gradients (this rank's shares, as numpy) of one step on this rank."""
    layout = platform.initialize(case.config())
    try:
        return _train_step(case, layout)
    finally:
        platform.teardown()


def _train_step(case: Case, layout: Layout) -> dict:
    model = build(case, layout)
    first_layer = model._pieces.first_decoder_layer
    half = case.precision != "fp32"
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(use_distributed_optimizer=False, grad_reduce_in_fp32=True),
        Float16Module(model.config, model) if half else model,
        disable_bucketing=True,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    indices = range(len(LENGTHS))[layout.dp_rank :: layout.dp_size]
    outputs: list[dict[str, torch.Tensor]] = []

    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        output = model(
            batch["tokens"], batch["image_mask"], batch["padding_mask"], batch["pixel_values"]
        )

        def loss_func(output):
            outputs.append(_complete(output, layout))
            output = {key: value.float() for key, value in output.items()}
            loss = _loss(case, output, batch, layout)
            return loss, torch.tensor(3, dtype=torch.int), {"loss": loss.detach()}

        return output, loss_func

    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([micro_batch(index) for index in indices]),
        model=[wrapped],
        num_microbatches=len(indices),
        seq_length=max(LENGTHS),
        micro_batch_size=3,
        forward_only=False,
    )
    return {
        "tp_rank": layout.tp_rank,
        "pp_rank": layout.pp_rank,
        "dp_rank": layout.dp_rank,
        "loss": float(sum(entry["loss"] for entry in losses)) if losses else None,
        "outputs": [{k: v.float().numpy() for k, v in output.items()} for output in outputs],
        "gradients": {
            global_name(name, first_layer): parameter.main_grad.numpy()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        },
    }


def _loss(case: Case, output: dict, batch: dict, layout: Layout) -> torch.Tensor:
    loss = (output["hidden"] * batch["probe"]).sum() * (0.01 if not case.frozen else 0)
    if "logits" in output:
        losses = tensor_parallel.vocab_parallel_cross_entropy(
            output["logits"].float().clone(), batch["labels"].T.contiguous()
        )
        loss = loss + losses.sum()
    if "condition" in output:
        condition, target = output["condition"], batch["target"]
        if case.split_rows:
            rows = take_rows(condition, layout)
            part = (rows - take_rows(target, layout)).square().sum()
            loss = loss + sum_over_tensor_ranks(part, layout)
        else:
            loss = loss + (condition - target).square().sum()
    if "reconstruction" in output:
        loss = loss + (output["reconstruction"] - output["hidden"]).square().sum() * 0.1
    return loss


def _complete(output: dict, layout: Layout) -> dict[str, torch.Tensor]:
    complete = {key: value.detach() for key, value in output.items()}
    if "logits" in complete and layout.tp_size > 1:
        shards = [torch.empty_like(complete["logits"]) for _ in range(layout.tp_size)]
        torch.distributed.all_gather(shards, complete["logits"].contiguous(), layout.tp_group)
        complete["logits"] = torch.cat(shards, dim=-1)
    return complete


def whole_gradients(results: list[dict], tolerance: float = 2e-6) -> dict[str, np.ndarray]:
    """The gradient of every parameter, put together from all ranks' shares.

    Replicas (over tensor-parallel ranks, data-parallel ranks, and the tied head's copy) must agree.
    """
    shares: dict[str, dict[int, np.ndarray]] = {}
    for result in results:
        for name, gradient in result["gradients"].items():
            if name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            known = shares.setdefault(name, {}).setdefault(result["tp_rank"], gradient)
            np.testing.assert_allclose(
                known, gradient, rtol=0, atol=tolerance * np.abs(known).max(), err_msg=name
            )
    whole = {}
    for name, by_rank in shares.items():
        ordered = [by_rank[rank] for rank in sorted(by_rank)]
        axis = split_axis(name)
        if axis is None:
            for other in ordered[1:]:
                np.testing.assert_allclose(
                    ordered[0], other, rtol=0, atol=tolerance * np.abs(other).max(), err_msg=name
                )
            whole[name] = ordered[0]
        else:
            whole[name] = np.concatenate(ordered, axis=axis)
    return whole


def on_one_rank(case: Case) -> Case:
    """The same model and loss without any parallelism."""
    return dataclasses.replace(
        case, tp=1, pp=1, sequence_parallel=False, pipeline_layout=None, recompute="none"
    )
