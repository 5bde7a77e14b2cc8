"""The stream of `pretrain`: packed rows of text, captioned images and interleaved documents.

The mixture counts rows. Labels that count are text and </s>; <s>, image slots, their <image> and
</image>, and padding do not. A bad image leaves its row as it is, with a blank image and no
loss from there to the end of its document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_kosmosg.data.bad_images import report_bad_image
from megatron_kosmosg.data.blend import Blend
from megatron_kosmosg.data.image_types import ImageTransform
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.packing import PackedDataset
from megatron_kosmosg.data.samples import PackedRow
from megatron_kosmosg.data.sequence import SequenceFormat


class PretrainStream:
    """The stream of packed rows of `seq_length` tokens for `pretrain`; its methods are explained at
    samples.StreamDataset."""

    def __init__(
        self,
        blend: Blend,
        datasets: dict[str, PackedDataset],
        sequence_format: SequenceFormat,
        seq_length: int,
        decoder: ImageDecoder,
        transform: ImageTransform,
        decodes: bool = True,
    ) -> None:
        """Joins the datasets of the mixture `blend` into one stream.

        Args:
            decodes: False leaves images undecoded, see samples.ImageStream.
        """
        self._blend, self._datasets = blend, datasets
        self._format, self._seq_length = sequence_format, seq_length
        self._decoder, self._transform, self._decodes = decoder, transform, decodes

    def __getitem__(self, position: int) -> PackedRow:
        blended = self._blend[position]
        return self._datasets[blended.name].row(blended.ordinal, position)

    def fingerprints(self) -> dict[str, str]:
        return {name: dataset.fingerprint() for name, dataset in self._datasets.items()}

    def lengths(self, positions: Sequence[int]) -> None:
        """None, which says that all rows are equally long."""

    def pad_to(self, samples: Sequence[PackedRow], global_positions: Sequence[int]) -> int:
        return self._seq_length

    def collate(
        self, samples: Sequence[PackedRow], pad_to: int, replacements: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """A batch of packed rows. tokens, labels int64 [b, s]; loss_mask float32 [b, s];
        image_mask, padding_mask bool [b, s] (True = image slot, True = padding); pixel_values
        uint8 [n, 3, H, W], n = 0 where images are not decoded; stream_positions int64 [b];
        bad_samples int64 []; replacements int64 [images of the rows], 1 where a blank image
        stands for a bad one. The argument `replacements` is explained at samples.ImageStream."""
        images = [(b, image) for b, row in enumerate(samples) for image in row.images]
        decodes = self._decodes and replacements is None
        pixels, errors = self._decoder.try_levels(
            [image.image for _, image in images] if decodes else [], self._transform
        )
        for error in errors:
            b, lost = images[error.index]
            report_bad_image(lost.dataset, lost.key, samples[b].position, error.reason)
        replaced = np.zeros(len(images), np.int64)
        replaced[[error.index for error in errors]] = 1
        if replacements is not None:
            replaced[:] = replacements
        shape = (len(samples), pad_to)
        pad = self._format.tokenizer.pad_id
        tokens, labels = np.full(shape, pad, np.int64), np.full(shape, pad, np.int64)
        loss_mask, image_mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
        padding_mask = np.ones(shape, bool)
        for b, row in enumerate(samples):
            n = len(row.tokens) - 1
            tokens[b, :n], labels[b, :n] = row.tokens[:-1], row.tokens[1:]
            loss_mask[b, :n], image_mask[b, :n] = row.label_mask[1:], row.image_mask[:-1]
            padding_mask[b, :n] = False
        for index in np.flatnonzero(replaced):
            b, image = images[index]
            loss_mask[b, image.start : image.document_end - 1] = 0
        arrays = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "image_mask": image_mask,
            "padding_mask": padding_mask,
        }
        return {k: torch.from_numpy(v) for k, v in arrays.items()} | {
            "pixel_values": pixels,
            "stream_positions": torch.tensor([row.position for row in samples]),
            "bad_samples": torch.tensor(int(replaced.sum())),
            "replacements": torch.from_numpy(replaced),
        }
