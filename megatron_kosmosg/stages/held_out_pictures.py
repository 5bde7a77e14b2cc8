"""The image grid of fixed held-out prompts that `instruct` draws while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from PIL import Image
from torch import nn

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.normalise import normalise_batch
from megatron_kosmosg.data.samples import StreamDataset
from megatron_kosmosg.evaluation.evaluator import DrawnImages, Evaluator, measure
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.stages.null_condition import forward_with_null_row
from megatron_kosmosg.training.forward import collect_outputs
from megatron_kosmosg.training.picture_grid import picture_grid, to_picture
from megatron_kosmosg.training.stage import Probe

CELL_PIXELS = 96
Draw = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Pictures of (conditions with the null condition last, positions, pixels per side)."""


def held_out_pictures(
    config: RunConfig,
    layout: Layout,
    draw: Draw,
    dataset: StreamDataset,
    model: list[nn.Module],
    evaluators: Mapping[str, Evaluator] = MappingProxyType({}),
) -> Probe:
    """A sheet with one row per held-out prompt: its pictures, the true image, the generated one.

    Called on all ranks together; empty on ranks that do not draw (all but one of the last stage).
    draw: called on that one, and so are the evaluators, which give the metrics.
    """
    if config.logging.num_images == 0:
        return Probe()
    positions = list(range(config.logging.num_images))
    samples = [dataset[position] for position in positions]
    batch = dataset.collate(samples, dataset.pad_to(samples, positions))
    batch = {name: value.to(layout.device) for name, value in batch.items()}
    batch = normalise_batch(batch, config)
    outputs = collect_outputs(forward_with_null_row, model, iter([batch]), 1)
    if not outputs or layout.tp_rank != 0 or layout.dp_rank != 0:
        return Probe()
    condition = outputs[0]["condition"]
    targets = batch["target_pixel_values"]
    results = draw(condition, torch.tensor(positions), targets.shape[-1])
    prompts = _prompt_pictures(config, batch)
    width = max(len(pictures) for pictures in prompts)
    rows = [
        pictures + [None] * (width - len(pictures)) + [to_picture(target), to_picture(result)]
        for pictures, target, result in zip(prompts, targets, results, strict=True)
    ]
    sheet = picture_grid(rows, CELL_PIXELS, ["prompt"] * width + ["truth", "result"])
    metrics = measure(evaluators, DrawnImages(results, targets))
    return Probe(metrics, {"held_out_prompts": sheet})


def _prompt_pictures(
    config: RunConfig, batch: dict[str, torch.Tensor]
) -> list[list[Image.Image | None]]:
    """The pictures of each prompt as the image tower saw them."""
    mean = torch.tensor(config.data.image_mean, device=batch["pixel_values"].device)
    std = torch.tensor(config.data.image_std, device=mean.device)
    pixels = (batch["pixel_values"] * std[:, None, None] + mean[:, None, None]) * 2 - 1
    slots = config.model.resampler.num_latent_queries
    counts = (batch["image_mask"].sum(dim=1) // slots).tolist()
    pictures = iter([to_picture(image) for image in pixels])
    return [[next(pictures) for _ in range(count)] for count in counts]
