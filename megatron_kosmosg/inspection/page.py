"""A dataset on one page: how long its samples are, and some of them as the model sees them.

Samples come from the training streams themselves, so the page shows what is trained on: packed rows
for `pretrain`, prompts with dropped words and painted backgrounds for `instruct`.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
from pathlib import Path

import torch
from PIL import Image

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import BlendEntry, RunConfig
from megatron_kosmosg.data.image_reading import read_image
from megatron_kosmosg.data.image_types import UnreadableImage
from megatron_kosmosg.data.samples import PackedRow, StreamDataset
from megatron_kosmosg.data.sequence import SequenceFormat
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.stored_sample import IMAGE
from megatron_kosmosg.data.streams import instruct_stream, pretrain_stream
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.files import write_text
from megatron_kosmosg.inspection.statistics import (
    QUANTILES,
    Lengths,
    length_statistics,
    token_use,
)

NAME = "dataset"
"""Of the inspected dataset in the mixture of one that its samples are drawn from."""
TOKEN_SAMPLES = 2000
STORED_PIXELS, PROMPT_PIXELS, TARGET_PIXELS = 96, 168, 300
"""Longer side of what is shown: twice the heights of page.css."""
PNG_BYTES, JPEG_QUALITY = 16 << 10, 85
"""Pictures that are larger as PNG are shown as JPEG: photos, not masks and drawings."""
_STYLE = Path(__file__).with_name("page.css")
_LEGEND = {
    "pretrain": "Rows of packed documents. Green text counts as a label in the loss; grey marks, "
    "pictures and anything outside do not.",
    "instruct": "Prompts, left to right, and the picture that the image decoder learns to draw. "
    "Words of entities and captions may be dropped and backgrounds painted white, by the same "
    "draws as in training; below, what is stored, masks among it.",
}


def inspection_config(
    prefix: str,
    config_file: str | None,
    tokenizer_model: str | None,
    seed: int,
    scratch: str | Path,
) -> RunConfig:
    """A run whose only data is the dataset under `prefix`, with the sizes of `config_file`.

    Without a file: the paper's sizes. scratch: folder for what the streams write. Raises
    ConfigError or ValueError for what does not fit.
    """
    base = RunConfig(stage="instruct")
    if config_file is not None:
        base = load_config(config_file, [])
    model_file = tokenizer_model or base.data.tokenizer_model
    if model_file is None:
        raise ValueError(f"{config_file} names no data.tokenizer_model; give --tokenizer-model")
    entries = {NAME: BlendEntry(prefix)}
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, vocab_size=Tokenizer(model_file).vocab_size),
        data=dataclasses.replace(
            base.data, tokenizer_model=model_file, blend=entries, heldout={}, latent_cache=None
        ),
        training=dataclasses.replace(base.training, seed=seed),
        logging=dataclasses.replace(base.logging, output_dir=str(scratch)),
    )


def summary_text(store: SampleStore, tokenizer: Tokenizer, seed: int) -> str:
    """Manifest, lengths and token use as lines of text."""
    if store.manifest is None:
        stated = "no manifest: a token dataset of another tool"
    else:
        fields = dataclasses.asdict(store.manifest)
        stated = ", ".join(f"{name} {value}" for name, value in fields.items())
    lines = [f"{store.prefix}: {stated}", f"{len(store):,} samples", ""]
    percent = "".join(f"{f'{q} %':>10}" for q in QUANTILES)
    lines.append(f"{'per sample':16}{percent}{'sum':>16}")
    for lengths in length_statistics(store):
        numbers = "".join(f"{value:>10,}" for value in lengths.quantiles())
        lines.append(f"{lengths.name:16}{numbers}{int(lengths.values.sum()):>16,}")
    use = token_use(store, tokenizer, TOKEN_SAMPLES, seed)
    frequent = ", ".join(f"{text!r} {count:,}" for text, count in use.most_frequent[:10])
    lines += [
        "",
        f"tokens of {use.num_samples:,} samples: {use.num_tokens:,}, {use.num_distinct:,} distinct "
        f"of {tokenizer.vocab_size:,}, {use.num_unknown:,} unknown, "
        f"{use.tokens_per_word:.2f} a word",
        f"most frequent: {frequent}",
    ]
    return "\n".join(lines)


def write_page(
    path: Path, store: SampleStore, tokenizer: Tokenizer, config: RunConfig, num_samples: int
) -> Path:
    """`path`, replaced as a whole; the page refers to no other file."""
    summary = summary_text(store, tokenizer, config.training.seed)
    charts = "".join(_histogram(lengths) for lengths in length_statistics(store))
    sections = []
    if store.sample_kind.pretrain is not None:
        stream = pretrain_stream(config, "train")
        sections.append(_section("pretrain", stream, store, tokenizer, config, num_samples))
    if store.sample_kind.instruct is not None:
        stream = instruct_stream(config, "train")
        sections.append(_section("instruct", stream, store, tokenizer, config, num_samples))
    title = f"{html.escape(Path(store.prefix).name)}: {store.kind} samples"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><h1>{title}</h1><pre>{html.escape(summary)}</pre>"
        f'<div class="charts">{charts}</div>{"".join(sections)}</body></html>\n'
    )
    write_text(path, page)
    return path


def _section(
    stage: str,
    stream: StreamDataset,
    store: SampleStore,
    tokenizer: Tokenizer,
    config: RunConfig,
    num_samples: int,
) -> str:
    drawer = _SampleDrawer(stream, store, tokenizer, config)
    cards = "".join(drawer.card(position) for position in range(num_samples))
    return f"<h2>As {stage} sees it</h2><p>{_LEGEND[stage]}</p>{cards}"


class _SampleDrawer:
    """Turns samples of a stream into HTML."""

    def __init__(
        self, stream: StreamDataset, store: SampleStore, tokenizer: Tokenizer, config: RunConfig
    ) -> None:
        self._stream, self._store, self._tokenizer = stream, store, tokenizer
        self._format = SequenceFormat(tokenizer, config.model.resampler.num_latent_queries)
        self._mean = torch.tensor(config.data.image_mean)[:, None, None]
        self._std = torch.tensor(config.data.image_std)[:, None, None]

    def card(self, position: int) -> str:
        """One sample of the stream."""
        sample = self._stream[position]
        batch = self._stream.collate([sample], self._stream.pad_to([sample], [position]))
        length = int((~batch["padding_mask"][0]).sum())
        slots = int(batch["image_mask"].sum())
        facts = f"position {position}, {length} tokens, {slots} of them picture slots"
        stored = target = ""
        if isinstance(sample, PackedRow):
            counted = batch["loss_mask"][0]
            facts += (
                f", {batch['tokens'].shape[1] - length} padding, {int(counted.sum())} labels count"
            )
            # A label belongs to the token it is the label of, one place further on.
            counts = [False, *(counted[: length - 1] > 0).tolist()]
        else:
            counts = [False] * length
            facts += f", sample {html.escape(sample.key)}"
            pixels = batch["target_pixel_values"][0]
            target = (
                f'<figure class="target">{_picture(pixels / 2 + 0.5, TARGET_PIXELS)}target</figure>'
            )
            stored = self._stored(sample.index)
        if int(batch["bad_samples"]):
            facts += f", {int(batch['bad_samples'])} bad pictures"
        pictures = [
            _picture(image * self._std + self._mean, PROMPT_PIXELS)
            for image in batch["pixel_values"]
        ]
        tokens = batch["tokens"][0, :length].tolist()
        prompt = self._tokens(tokens, counts, pictures)
        return (
            f'<article><header>{facts}</header><div class="row"><div class="prompt">{prompt}</div>'
            f"{target}</div>{stored}</article>"
        )

    def _tokens(self, tokens: list[int], counts: list[bool], pictures: list[str]) -> str:
        """Text runs with their token boundaries, marks, and pictures in place of their slots."""
        tokenizer, parts, place, seen = self._tokenizer, [], 0, iter(pictures)
        marks = {tokenizer.bos_id: "&lt;s&gt;", tokenizer.eos_id: "&lt;/s&gt;"}
        while place < len(tokens):
            if tokens[place] == tokenizer.image_id:
                parts.append(next(seen))
                place += self._format.image_length
                continue
            end = place
            while end < len(tokens) and tokens[end] not in (*marks, tokenizer.image_id):
                end += 1
            if end == place:
                shown = "mark counts" if counts[place] else "mark"
                parts.append(f'<span class="{shown}">{marks[tokens[place]]}</span> ')
                place += 1
                continue
            parts.append(self._text(tokens[place:end], counts[place:end]))
            place = end
        return "".join(parts)

    def _text(self, ids: list[int], counts: list[bool]) -> str:
        shown, before = [], ""
        for i in range(len(ids)):
            text = self._tokenizer.decode(ids[: i + 1])
            kind = f"t{i % 2} counts" if counts[i] else f"t{i % 2}"
            piece = text[len(before) :] if text.startswith(before) else text
            shown.append(f'<span class="{kind}">{html.escape(piece)}</span>')
            before = text
        return "".join(shown) + " "

    def _stored(self, index: int) -> str:
        """The stored text fields and pictures, masks among them."""
        raw = self._store[index]
        fields = html.escape(json.dumps(raw.info, ensure_ascii=False))
        pictures = "".join(
            _encoded(part.tobytes())
            for part, mode in zip(raw.parts, raw.modes, strict=True)
            if mode == IMAGE
        )
        return (
            f'<div class="small">stored: {pictures}<details><summary>fields</summary>'
            f"<code>{fields}</code></details></div>"
        )


def _histogram(lengths: Lengths) -> str:
    bars = lengths.histogram()
    most = max(count for _, _, count in bars)
    rows = "".join(
        f"<tr><td>{low:,}{'' if low == high else f' to {high:,}'}</td>"
        f'<td class="bar"><i style="width:{100 * count / most:.1f}%"></i></td>'
        f"<td>{count:,}</td></tr>"
        for low, high, count in bars
    )
    return f"<table><caption>{lengths.name} per sample</caption>{rows}</table>"


def _picture(pixels: torch.Tensor, side: int) -> str:
    """pixels: [3, height, width] in [0, 1]; side: of the picture on the page, at most."""
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    image.thumbnail((side, side))
    return _image_tag(image)


def _encoded(data: bytes) -> str:
    try:
        image = read_image(data)
    except UnreadableImage:
        return '<span class="bad">cannot be decoded</span>'
    image.thumbnail((STORED_PIXELS, STORED_PIXELS))
    return _image_tag(image)


def _image_tag(image: Image.Image) -> str:
    out, kind = io.BytesIO(), "png"
    image.save(out, "PNG")
    if out.tell() > PNG_BYTES:
        out, kind = io.BytesIO(), "jpeg"
        image.convert("RGB").save(out, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="picture" src="data:image/{kind};base64,{data}">'
