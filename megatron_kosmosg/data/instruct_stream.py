"""The stream of `instruct`: prompts with images and the image to draw, mixed by weight.

A sample whose prompt has a bad image, or is too long, is replaced by another of its dataset,
drawn by key. One whose target is bad stays and gets no weight, because ranks without the U-Net do
not read targets. Lengths come from the index, without reading a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.data.bad_images import TooManyBadImages, report_bad_image
from megatron_kosmosg.data.blend import Blend
from megatron_kosmosg.data.image_types import BadImage, Encoded, ImageTransform
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.kinds.kind import PromptMaker
from megatron_kosmosg.data.latent_cache import LatentCache
from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.padding import pad_rows
from megatron_kosmosg.data.random_keys import SampleKey
from megatron_kosmosg.data.samples import PromptSample
from megatron_kosmosg.data.store import SampleStore

MAX_REPLACEMENTS = 100
"""Samples in a row that may be too long, or have undecodable prompt images."""

NoiseSource = Callable[[Tensor], dict[str, Tensor]]
"""Random draws of samples, by name: one row for each of these stream positions."""
Reads = Literal["all", "prompts", "targets"]
"""What a batch holds: ranks without the U-Net need no targets, ranks of the U-Net no prompts."""


@dataclass(frozen=True)
class PromptSource:
    """One dataset of the mixture."""

    store: SampleStore
    order: SampleOrder
    make_prompt: PromptMaker
    latents: LatentCache | None = None
    """VAE moments of its targets, which are then not decoded."""


@dataclass(frozen=True)
class _Choice:
    """The sample that stands at a position, and the length of its prompt."""

    dataset: str
    index: int
    replacement: int
    length: int


class InstructStream:
    """The stream of prompts for `instruct`; samples.StreamDataset explains its methods."""

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
        reads: Reads = "all",
        decodes_prompts: bool = True,
        packs: bool = False,
        noise_source: NoiseSource | None = None,
    ) -> None:
        """Joins the datasets of the mixture `blend` into one stream.

        Args:
            max_length: tokens of the longest prompt.
            transforms: of prompt images and of target images.
            decodes_prompts: False leaves prompt images undecoded, see samples.ImageStream.
            packs: whether prompts are also given end to end, see padding.pad_rows.
            noise_source: for the stream positions of a batch, further tensors of the batch.
        """
        self._decodes_prompts = decodes_prompts
        self._reads = reads
        self._packs, self._noise_source = packs, noise_source
        self._blend, self._sources = blend, sources
        self._seed, self._stage = seed, stage
        self._max_length, self._pad_id = max_length, pad_id
        self._decoder = decoder
        self._prompt_transform, self._target_transform = transforms

    def __getitem__(self, position: int) -> PromptSample:
        return self._sample(position, 0)

    def fingerprints(self) -> dict[str, str]:
        return {name: source.store.fingerprint() for name, source in self._sources.items()}

    def lengths(self, positions: Sequence[int]) -> np.ndarray:
        """Tokens of the prompts at `positions`: a micro-batch is as wide as its longest."""
        return np.array([self._choose(position, 0).length for position in positions], np.int64)

    def pad_to(self, samples: Sequence[PromptSample], global_positions: Sequence[int]) -> int:
        """The longest of the micro-batch: padding does not enter this stage's loss."""
        return max(len(sample.prompt.tokens) for sample in samples)

    def collate(
        self,
        samples: Sequence[PromptSample],
        pad_to: int,
        replacements: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """A batch of prompts. tokens, image_mask, padding_mask [b, s], and `packed` as of pad_rows;
        pixel_values uint8 [n, 3, H, W], n over (b, position), n = 0 where prompt images are not
        decoded; stream_positions, replacements int64 [b]; bad_samples int64 []. The argument
        `replacements` is explained at samples.ImageStream.

        Targets: target_pixel_values uint8 [b, 3, T, T], or, where they are cached,
        target_moments float16 [b, 2, channels, height, width] (mean and deviation); and
        target_weights float32 [b], 0 where the target is bad and stands for nothing, else 1.
        And what `noise_source` gives.
        """
        if replacements is None:
            samples, num_bad, images = self._images(list(samples))
        else:
            samples, num_bad = self._replaced(samples, replacements)
            images = self._no_images()
        targets, bad_targets = self._targets(samples)
        for error in bad_targets:
            lost = samples[error.index]
            report_bad_image(
                lost.dataset, lost.key, lost.position, error.reason, "counts for nothing"
            )
        rows: dict[str, Tensor] = {}
        if self._reads != "targets":
            rows = pad_rows(
                [sample.prompt.tokens for sample in samples],
                [sample.prompt.image_mask for sample in samples],
                pad_to,
                self._pad_id,
                packs=self._packs,
            )
        numbers = {
            name: torch.tensor(values, dtype=torch.int64)
            for name, values in (
                ("stream_positions", [sample.position for sample in samples]),
                ("replacements", [sample.replacement for sample in samples]),
            )
        }
        noise = {}
        if self._noise_source is not None:
            noise = self._noise_source(numbers["stream_positions"])
        bad_samples = torch.tensor(num_bad + len(bad_targets))
        return rows | images | targets | noise | numbers | {"bad_samples": bad_samples}

    def _choose(self, position: int, first: int) -> _Choice:
        """The first sample that fits, from replacement index `first` on."""
        blended = self._blend[position]
        source, key = self._sources[blended.name], SampleKey(self._seed, self._stage, position)
        for replacement in range(first, first + MAX_REPLACEMENTS):
            index = source.order.replacement(blended.ordinal, position, replacement)
            length = source.make_prompt.length(source.store.part_sizes(index), key)
            if length is not None and length <= self._max_length:
                return _Choice(blended.name, index, replacement, length)
        raise ConfigError(
            f"dataset {blended.name}: {MAX_REPLACEMENTS} samples in a row are longer than "
            f"data.seq_length={self._max_length}; raise it"
        )

    def _sample(self, position: int, first: int) -> PromptSample:
        choice = self._choose(position, first)
        source = self._sources[choice.dataset]
        raw = source.store[choice.index]
        prompt = source.make_prompt(raw, SampleKey(self._seed, self._stage, position))
        return PromptSample(
            position, prompt, choice.dataset, raw.info["key"], choice.index, choice.replacement
        )

    def _images(
        self, samples: list[PromptSample]
    ) -> tuple[list[PromptSample], int, dict[str, Tensor]]:
        """The samples, those with bad prompt images replaced; how many were; the images."""
        if self._reads == "targets" or not self._decodes_prompts:
            return samples, 0, self._no_images()
        num_bad, num_replaced = 0, [0] * len(samples)
        while True:
            owners = [i for i, s in enumerate(samples) for _ in s.prompt.images]
            images: list[Encoded] = [image for s in samples for image in s.prompt.images]
            pixels, errors = self._decoder.try_levels(images, self._prompt_transform)
            bad = {owners[error.index]: error for error in errors}
            if not bad:
                return samples, num_bad, {"pixel_values": pixels}
            num_bad += len(bad)
            for i in sorted(bad):
                old = samples[i]
                report_bad_image(old.dataset, old.key, old.position, bad[i].reason)
                num_replaced[i] += 1
                if num_replaced[i] > MAX_REPLACEMENTS:
                    raise TooManyBadImages(
                        f"dataset {old.dataset}: prompt images of {num_replaced[i]} samples in a "
                        f"row cannot be decoded, the last for this reason: {bad[i].reason}; look "
                        "at it with `kosmosg inspect --check`, or leave it out of data.blend"
                    )
                samples[i] = self._sample(old.position, old.replacement + 1)

    def _replaced(
        self, samples: Sequence[PromptSample], replacements: Sequence[int]
    ) -> tuple[list[PromptSample], int]:
        """The samples of these replacement indices; how many bad ones they replace in all."""
        num_bad, found = 0, []
        for sample, replacement in zip(samples, replacements, strict=True):
            while sample.replacement < replacement:
                num_bad += 1
                sample = self._sample(sample.position, sample.replacement + 1)
            if sample.replacement != replacement:
                raise RuntimeError(
                    f"stream position {sample.position} of dataset {sample.dataset}: another rank "
                    f"reads replacement {replacement}, which is too long here; do all ranks read "
                    "the same files?"
                )
            found.append(sample)
        return found, num_bad

    def _no_images(self) -> dict[str, Tensor]:
        if self._reads == "targets":
            return {}
        return {"pixel_values": self._decoder.try_levels([], self._prompt_transform)[0]}

    def _targets(self, samples: list[PromptSample]) -> tuple[dict[str, Tensor], list[BadImage]]:
        if self._reads == "prompts":
            return {}, []
        latents = [self._sources[sample.dataset].latents for sample in samples]
        caches = [cache for cache in latents if cache is not None]
        if len(caches) < len(samples):
            encoded = [bytes(s.prompt.target or b"") for s in samples]
            pixels, bad = self._decoder.try_levels(encoded, self._target_transform)
            targets = {"target_pixel_values": pixels}
        else:
            stored = [
                cache.moments(sample.index) for cache, sample in zip(caches, samples, strict=True)
            ]
            reason = "the target has no cached latents because it could not be decoded"
            bad = [BadImage(i, reason) for i, moments in enumerate(stored) if moments is None]
            blank = np.zeros(caches[0].manifest.shape, np.float16)
            whole = [blank if moments is None else moments for moments in stored]
            targets = {"target_moments": torch.from_numpy(np.stack(whole))}
        weights = torch.ones(len(samples))
        weights[[error.index for error in bad]] = 0.0
        return targets | {"target_weights": weights}, bad
