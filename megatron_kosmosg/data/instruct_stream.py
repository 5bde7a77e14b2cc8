"""The stream of `instruct`: prompts with pictures and the picture to draw, mixed by weight.

A sample whose picture is bad, or whose prompt is too long, is replaced by another of its dataset,
drawn by key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kosmosg.data.bad_samples import BadSampleCounter
from megatron_kosmosg.data.blend import Blend
from megatron_kosmosg.data.images import BadImage, Encoded, ImageDecoder, ImageTransform
from megatron_kosmosg.data.keyed import Draws
from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.padding import pad_rows
from megatron_kosmosg.data.samples import Prompt, PromptSample
from megatron_kosmosg.data.store import RawSample, SampleStore

MAX_ATTEMPTS = 100
PromptMaker = Callable[[RawSample, Draws], Prompt | None]
"""The prompt of a stored sample, None where it cannot be used."""


@dataclass(frozen=True)
class PromptSource:
    """One dataset of the mixture."""

    store: SampleStore
    order: SampleOrder
    make_prompt: PromptMaker


class InstructStream:
    """Prompts; see samples.StreamDataset."""

    def __init__(
        self,
        blend: Blend,
        sources: dict[str, PromptSource],
        seed: int,
        stage: str,
        max_length: int,
        pad_id: int,
        decoder: ImageDecoder,
        transforms: tuple[ImageTransform, ImageTransform],
        bad_samples: BadSampleCounter,
    ) -> None:
        """`max_length`: tokens of the longest prompt. `transforms`: of prompt and target images."""
        self._blend, self._sources = blend, sources
        self._seed, self._stage = seed, stage
        self._max_length, self._pad_id = max_length, pad_id
        self._decoder, self._bad_samples = decoder, bad_samples
        self._prompt_transform, self._target_transform = transforms

    def __getitem__(self, position: int) -> PromptSample:
        return self._sample(position, 0)

    def length(self, position: int) -> int:
        return len(self[position].prompt.tokens)

    def pad_to(self, samples: Sequence[PromptSample], global_positions: Sequence[int]) -> int:
        """The longest of the micro-batch: padding does not enter this stage's loss."""
        return max(len(sample.prompt.tokens) for sample in samples)

    def statistics(self) -> dict[str, int]:
        return {"bad_samples": self._bad_samples.count}

    def collate(self, samples: Sequence[PromptSample], pad_to: int) -> dict[str, Tensor]:
        """tokens, image_mask, padding_mask [b, s]; pixel_values float32 [n, 3, H, W], n over (b,
        position); target_pixel_values float32 [b, 3, T, T] in [-1, 1]; stream_positions int64 [b].
        """
        samples, pixels, targets = self._decode(list(samples))
        rows = pad_rows(
            [sample.prompt.tokens for sample in samples],
            [sample.prompt.image_mask for sample in samples],
            pad_to,
            self._pad_id,
        )
        positions = torch.tensor([sample.position for sample in samples], dtype=torch.int64)
        return rows | {
            "pixel_values": pixels,
            "target_pixel_values": targets,
            "stream_positions": positions,
        }

    def _sample(self, position: int, first_attempt: int) -> PromptSample:
        draw = self._blend[position]
        source = self._sources[draw.name]
        for attempt in range(first_attempt, first_attempt + MAX_ATTEMPTS):
            raw = source.store[source.order.candidate(draw.ordinal, position, attempt)]
            prompt = source.make_prompt(raw, Draws(self._seed, self._stage, position))
            if prompt is not None and len(prompt.tokens) <= self._max_length:
                return PromptSample(position, prompt, draw.name, raw.info["key"], attempt)
        raise ValueError(
            f"dataset {draw.name}: {MAX_ATTEMPTS} samples in a row are longer than "
            f"data.seq_length={self._max_length}; raise it"
        )

    def _decode(self, samples: list[PromptSample]) -> tuple[list[PromptSample], Tensor, Tensor]:
        while True:
            owners = [i for i, s in enumerate(samples) for _ in s.prompt.images]
            images: list[Encoded] = [image for s in samples for image in s.prompt.images]
            targets = [s.prompt.target or b"" for s in samples]
            pixels, bad_images = self._decoder.try_decode(images, self._prompt_transform)
            target_pixels, bad_targets = self._decoder.try_decode(targets, self._target_transform)
            bad: dict[int, BadImage] = {owners[error.index]: error for error in bad_images}
            bad |= {error.index: error for error in bad_targets}
            if not bad:
                return samples, pixels, target_pixels
            for i in sorted(bad):
                old = samples[i]
                self._bad_samples.report(old.dataset, old.key, old.position, bad[i].reason)
                samples[i] = self._sample(old.position, old.attempt + 1)
