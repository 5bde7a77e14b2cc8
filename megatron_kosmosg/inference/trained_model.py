"""The newest checkpoint of a run as one whole model on one process, ready to be asked.

Works from a checkpoint of any layout: Megatron-Core's distributed checkpoints reshard on load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from megatron_kosmosg.checkpoint.folder import CONFIG_FILE, find_checkpoint
from megatron_kosmosg.checkpoint.save_and_resume import checkpoint_metadata
from megatron_kosmosg.checkpoint.weights import load_weights
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_saved_config
from megatron_kosmosg.config.rank_grid import single_process_config
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.image_reading import encode_png, upright_rgb
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.normalise import prompt_transform
from megatron_kosmosg.data.padding import pad_rows
from megatron_kosmosg.data.samples import Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.stages import build_stage
from megatron_kosmosg.stages.null_condition import forward_with_null_row

Parts = Sequence[str | Image.Image]
ROWS_PER_PASS = 32
"""Prompts of one forward pass."""


@contextmanager
def single_process(config: RunConfig) -> Iterator[ParallelContext]:
    """The layout of a process that holds the whole model; groups are left on exit."""
    try:
        yield platform.initialize(single_process_config(config))
    finally:
        platform.teardown()


def build_prompt(parts: Parts, sequence_format: SequenceFormat) -> Prompt:
    """An interleaved list of words and images as the model's prompt (authors' demo).

    `["a", image, "in the snow"]` becomes <s> a <image> slots </image> in the snow; every fragment
    is tokenized on its own, and no </s> follows.
    """
    builder = SequenceBuilder(sequence_format).add_start()
    for part in parts:
        if isinstance(part, str):
            builder.add_text(sequence_format.tokenizer.encode(part))
        else:
            builder.add_image(encode_png(upright_rgb(part)))
    return builder.prompt()


class TrainedModel:
    """A run's model in eval mode. Prompts are interleaved lists of words and images."""

    def __init__(self, run: Path, context: ParallelContext) -> None:
        checkpoint = find_checkpoint(run, option="")
        self.config = single_process_config(load_saved_config(checkpoint / CONFIG_FILE))
        self.stage = build_stage(self.config, context)
        (self.model,) = self.stage.build_model(context)
        load_weights(checkpoint, [self.model], checkpoint_metadata(context))
        self.model.eval().requires_grad_(False)
        model_file = self.config.data.tokenizer_model
        if model_file is None:
            raise ConfigError(f"{checkpoint / CONFIG_FILE} names no data.tokenizer_model")
        self.tokenizer = Tokenizer(model_file)
        self.sequence_format = SequenceFormat(
            self.tokenizer, self.config.model.resampler.num_latent_queries
        )
        self._images = ImageDecoder(self.config.data.image_backend)
        self._context = context

    @torch.no_grad()
    def conditions(self, prompts: Sequence[Parts]) -> tuple[torch.Tensor, torch.Tensor]:
        """(conditions [n, c, d] of the prompts, null condition [1, c, d])."""
        found = []
        for start in range(0, len(prompts), ROWS_PER_PASS):
            batch = self.batch(prompts[start : start + ROWS_PER_PASS])
            found.append(forward_with_null_row(batch, self.model)["condition"])
        return torch.cat([rows[:-1] for rows in found]), found[0][-1:]

    @torch.no_grad()
    def logits(self, prompts: Sequence[Parts]) -> tuple[torch.Tensor, torch.Tensor]:
        """(next-token logits [b, s, v], tokens [b, s]) of a `pretrain` model."""
        batch = self.batch(prompts)
        output = self.model(
            batch["tokens"], batch["image_mask"], batch["padding_mask"], batch["pixel_values"]
        )
        return output["logits"].transpose(0, 1), batch["tokens"]

    def batch(self, prompts: Sequence[Parts]) -> dict[str, torch.Tensor]:
        """The prompts as the model's inputs, padded to the longest."""
        built = [build_prompt(parts, self.sequence_format) for parts in prompts]
        pixels = self._images.decode(
            [image for prompt in built for image in prompt.images], prompt_transform(self.config)
        )
        batch = pad_rows(
            [prompt.tokens for prompt in built],
            [prompt.image_mask for prompt in built],
            0,
            self.tokenizer.pad_id,
        )
        batch["pixel_values"] = pixels
        return {name: value.to(self._context.device) for name, value in batch.items()}
