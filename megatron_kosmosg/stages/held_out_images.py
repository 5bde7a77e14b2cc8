"""The image grid of fixed held-out prompts that `instruct` draws while it trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.utils import get_model_config
from PIL import Image
from torch import nn

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.normalise import normalise_batch
from megatron_kosmosg.data.samples import PromptSample, StreamDataset
from megatron_kosmosg.evaluation.evaluator import Evaluator, GeneratedImages, measure
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.pipeline_link import pipeline_schedule
from megatron_kosmosg.stages.null_condition import forward_with_null_row
from megatron_kosmosg.training.image_grid import image_grid, to_image
from megatron_kosmosg.training.stage import Probe

CELL_PIXELS = 96
GRID = "held_out_prompts"
PROMPTS_TOGETHER = 8
"""That are drawn at once where there is no grid; otherwise as many as it shows."""
GenerateImages = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor | None]
"""Images of (conditions with the null condition last, positions, pixels per side); None where the
run is about to be stopped."""


def held_out_images(
    config: RunConfig,
    context: ParallelContext,
    generate: GenerateImages,
    dataset: StreamDataset,
    model: Sequence[nn.Module],
    evaluators: Mapping[str, Evaluator] = MappingProxyType({}),
    num_measured: int | None = None,
) -> Probe | None:
    """A grid with one row per held-out prompt: its images, the true image, the generated one.

    Called on all ranks together; empty on ranks that do not generate (all but one of the last
    pipeline stage). Returns None where that one gave up, because the run is about to be stopped.

    Args:
        generate: called on that rank alone, and so are the evaluators, which give the metrics.
        num_measured: prompts whose images the evaluators see; None is those of the grid.
    """
    shown = config.logging.num_images
    measured = shown if num_measured is None else num_measured
    together = shown or PROMPTS_TOGETHER
    count = max(shown, measured if evaluators else 0)
    grid, words, drawn, is_interrupted = {}, {}, [], False
    for start in range(0, count, together):
        positions = range(start, min(start + together, count))
        found = _generated(config, context, generate, dataset, model, positions)
        if found is None:
            continue
        batch, images = found
        if images is None:  # the other ranks go on to the last prompt, so this one does, too
            is_interrupted = True
            continue
        if start == 0 and shown:
            grid[GRID] = _grid(config, batch, images)
            words[GRID] = tuple(text or "" for text in images.texts)
        drawn.append(images)
    if is_interrupted:
        return None
    if not drawn:
        return Probe()
    texts = [text for images in drawn for text in images.texts]
    images = GeneratedImages(
        torch.cat([images.results for images in drawn])[:measured],
        torch.cat([images.targets for images in drawn])[:measured],
        tuple(texts[:measured]),
    )
    return Probe(measure(evaluators, images) if measured else {}, grid, words)


def _generated(
    config: RunConfig,
    context: ParallelContext,
    generate: GenerateImages,
    dataset: StreamDataset,
    model: Sequence[nn.Module],
    positions: Sequence[int],
) -> tuple[dict[str, torch.Tensor], GeneratedImages | None] | None:
    """The batch of these prompts with what was drawn for them, None for the latter where the run
    is about to be stopped; None on ranks that do not draw."""
    samples = [dataset[position] for position in positions]
    batch = dataset.collate(samples, dataset.pad_to(samples, positions))
    batch = {name: value.to(context.device) for name, value in batch.items()}
    batch = normalise_batch(batch, config)
    outputs = _collect_outputs(context, forward_with_null_row, model, iter([batch]), 1)
    if not outputs or context.tp_rank != 0 or context.dp_rank != 0:
        return None
    condition = outputs[0]["condition"]
    targets = batch["target_pixel_values"]
    results = generate(condition, torch.tensor(list(positions)), targets.shape[-1])
    if results is None:
        return batch, None
    # Another sample stands in the place of one with a bad image, and its words are not known here.
    is_first = (batch["replacements"] == 0).tolist()
    texts = tuple(
        sample.prompt.caption if isinstance(sample, PromptSample) and first else None
        for sample, first in zip(samples, is_first, strict=True)
    )
    return batch, GeneratedImages(results, targets, texts)


def _grid(
    config: RunConfig, batch: dict[str, torch.Tensor], images: GeneratedImages
) -> Image.Image:
    prompts = _prompt_images(config, batch)
    width = max(len(shown) for shown in prompts)
    rows = [
        shown + [None] * (width - len(shown)) + [to_image(target), to_image(result)]
        for shown, target, result in zip(prompts, images.targets, images.results, strict=True)
    ]
    return image_grid(rows, CELL_PIXELS, ["prompt"] * width + ["truth", "result"])


def _prompt_images(
    config: RunConfig, batch: dict[str, torch.Tensor]
) -> list[list[Image.Image | None]]:
    """The images of each prompt as the image tower saw them."""
    mean = torch.tensor(config.data.image_mean, device=batch["pixel_values"].device)
    std = torch.tensor(config.data.image_std, device=mean.device)
    pixels = (batch["pixel_values"] * std[:, None, None] + mean[:, None, None]) * 2 - 1
    slots = config.model.resampler.num_latent_queries
    counts = (batch["image_mask"].sum(dim=1) // slots).tolist()
    shown = iter([to_image(image) for image in pixels])
    return [[next(shown) for _ in range(count)] for count in counts]


@torch.no_grad()
def _collect_outputs(
    context: ParallelContext,
    forward: Callable[[dict[str, torch.Tensor], nn.Module], Any],
    model: Sequence[nn.Module],
    micro_batches: Iterator[dict[str, torch.Tensor]],
    num_microbatches: int,
) -> list[Any]:
    """What `forward(batch, model)` gives for each micro-batch, without loss or gradient, through
    the pipeline schedule of training; an empty list before the last pipeline stage.

    model: the chunks of this rank. All ranks of a replica call this together. The model's
    train/eval mode is the caller's choice.
    """
    batches = list(itertools.islice(micro_batches, num_microbatches))
    if len(model) > 1:  # interleaved pipeline stages take micro-batches in whole groups
        group = get_model_config(model[0]).microbatch_group_size_per_vp_stage
        batches += batches[-1:] * (-num_microbatches % group)

    def forward_step(data_iterator, chunk):
        output = forward(next(data_iterator), chunk)
        return output, lambda output, non_loss_data=True: output

    outputs = pipeline_schedule(context, get_model_config(model[0]))(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in model],
        model=[*model],
        num_microbatches=len(batches),
        seq_length=1,  # shapes travel with the tensors (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[:num_microbatches]
