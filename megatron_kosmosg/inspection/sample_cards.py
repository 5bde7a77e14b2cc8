"""Samples of a stream as what a page shows of them: facts, text, marks and images."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import torch
from PIL import Image

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.image_reading import read_image
from megatron_kosmosg.data.image_types import UnreadableImage
from megatron_kosmosg.data.normalise import normalise_batch
from megatron_kosmosg.data.samples import PackedRow, StreamDataset
from megatron_kosmosg.data.sequence import SequenceFormat
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.stored_sample import IMAGE
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.pages import data_uri

STORED_PIXELS, PROMPT_PIXELS, TARGET_PIXELS = 96, 168, 300
"""Longer side of what is shown: twice the heights of page.css."""
PNG_BYTES, JPEG_QUALITY = 8 << 10, 80
"""Images that are larger as PNG are shown as JPEG: photos, not masks and drawings. A packed row
of the paper's sizes has up to 31 images, so that what one takes decides the size of the page."""


@dataclass(frozen=True)
class Piece:
    """One token of text, one mark, or one image in place of its slots."""

    text: str = ""
    image: str | None = None
    """Address that holds the image."""
    classes: str = ""
    """Of the page's style."""
    ends_run: bool = False
    """Whether a space follows, which is not in the sample."""


@dataclass(frozen=True)
class SampleCard:
    """One sample of a stream as the page shows it."""

    facts: str
    prompt: list[Piece]
    target: str | None = None
    """Address that holds the image that is learned; None where a sample has none."""
    stored: list[str | None] | None = None
    """Addresses of the stored images, None for those that cannot be decoded; None where a row
    holds parts of many samples."""
    fields: str = ""
    """JSON of the stored text."""


class SampleCards:
    """Makes cards of the samples of one stream over `store`."""

    def __init__(
        self, stream: StreamDataset, store: SampleStore, tokenizer: Tokenizer, config: RunConfig
    ) -> None:
        self._stream, self._store, self._tokenizer = stream, store, tokenizer
        self._format = SequenceFormat(tokenizer, config.model.resampler.num_latent_queries)
        self._config = config
        self._mean = torch.tensor(config.data.image_mean)[:, None, None]
        self._std = torch.tensor(config.data.image_std)[:, None, None]

    def card(self, position: int) -> SampleCard:
        """The sample at that position of the stream."""
        sample = self._stream[position]
        batch = self._stream.collate([sample], self._stream.pad_to([sample], [position]))
        batch = normalise_batch(batch, self._config)
        length = int((~batch["padding_mask"][0]).sum())
        slots = int(batch["image_mask"].sum())
        facts = f"position {position}, {length} tokens, {slots} of them image slots"
        bad = int(batch["bad_samples"])
        bad_note = f", {bad} bad images" if bad else ""
        tokens = batch["tokens"][0, :length].tolist()
        images = [
            _image(image * self._std + self._mean, PROMPT_PIXELS) for image in batch["pixel_values"]
        ]
        if isinstance(sample, PackedRow):
            counted = batch["loss_mask"][0]
            padding = batch["tokens"].shape[1] - length
            facts += f", {padding} padding, {int(counted.sum())} labels count{bad_note}"
            # A label belongs to the token it is the label of, one place further on.
            counts = [False, *(counted[: length - 1] > 0).tolist()]
            return SampleCard(facts, self._pieces(tokens, counts, images))
        facts += f", sample {sample.key}{bad_note}"
        raw = self._store[sample.index]
        return SampleCard(
            facts,
            self._pieces(tokens, [False] * length, images),
            target=_image(batch["target_pixel_values"][0] / 2 + 0.5, TARGET_PIXELS),
            stored=[
                _encoded(part.tobytes())
                for part, mode in zip(raw.parts, raw.modes, strict=True)
                if mode == IMAGE
            ],
            fields=json.dumps(raw.info, ensure_ascii=False),
        )

    def _pieces(self, tokens: list[int], counts: list[bool], images: list[str]) -> list[Piece]:
        """Text runs with their token boundaries, marks, and images in place of their slots."""
        tokenizer, place, seen = self._tokenizer, 0, iter(images)
        marks = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
        pieces: list[Piece] = []
        while place < len(tokens):
            if tokens[place] == tokenizer.image_id:
                pieces.append(Piece(image=next(seen)))
                place += self._format.image_length
                continue
            end = place
            while end < len(tokens) and tokens[end] not in (*marks, tokenizer.image_id):
                end += 1
            if end == place:
                classes = "mark counts" if counts[place] else "mark"
                pieces.append(Piece(marks[tokens[place]], classes=classes, ends_run=True))
                place += 1
                continue
            pieces += self._text(tokens[place:end], counts[place:end])
            place = end
        return pieces

    def _text(self, ids: list[int], counts: list[bool]) -> list[Piece]:
        pieces, before = [], ""
        for i in range(len(ids)):
            text = self._tokenizer.decode(ids[: i + 1])
            classes = f"t{i % 2} counts" if counts[i] else f"t{i % 2}"
            piece = text[len(before) :] if text.startswith(before) else text
            pieces.append(Piece(piece, classes=classes, ends_run=i == len(ids) - 1))
            before = text
        return pieces


def _image(pixels: torch.Tensor, side: int) -> str:
    """An image for the page. `pixels` is [3, height, width] in [0, 1]; `side` the most that it may
    measure on the page."""
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    image.thumbnail((side, side))
    return _address(image)


def _encoded(data: bytes) -> str | None:
    try:
        image = read_image(data)
    except UnreadableImage:
        return None
    image.thumbnail((STORED_PIXELS, STORED_PIXELS))
    return _address(image)


def _address(image: Image.Image) -> str:
    out, kind = io.BytesIO(), "png"
    image.save(out, "PNG")
    if out.tell() > PNG_BYTES:
        out, kind = io.BytesIO(), "jpeg"
        image.convert("RGB").save(out, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return data_uri(out.getvalue(), f"image/{kind}")
