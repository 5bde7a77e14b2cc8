"""A dataset on one page: how long its samples are, and some of them as the model sees them.

Samples come from the training streams themselves, so the page shows what is trained on: packed rows
for `pretrain`, prompts with dropped words and painted backgrounds for `instruct`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import BlendEntry, RunConfig
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.streams import instruct_stream, pretrain_stream
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.files import write_text
from megatron_kosmosg.inspection.sample_cards import SampleCards
from megatron_kosmosg.inspection.statistics import (
    QUANTILES,
    length_statistics,
    looked_at,
    token_use,
)
from megatron_kosmosg.pages import render_page

NAME = "dataset"
"""Of the inspected dataset in the mixture of one that its samples are drawn from."""
TOKEN_SAMPLES = 2000
_TEMPLATE = Path(__file__).with_name("page.html")
_LEGEND = {
    "pretrain": "Rows of packed documents. Green text counts as a label in the loss; grey marks, "
    "images and anything outside do not.",
    "instruct": "Prompts, left to right, and the image that the image decoder learns to draw. "
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
        fields = dataclasses.asdict(store.manifest) | {"shards": len(store.manifest.shards)}
        if not store.manifest.shards:
            del fields["shards"]
        stated = ", ".join(f"{name} {value}" for name, value in fields.items())
    lines = [f"{store.prefix}: {stated}", f"{len(store):,} samples", ""]
    num_looked_at = len(looked_at(store))
    if num_looked_at < len(store):
        lines[1] += f"; lengths and sums of {num_looked_at:,} of them, spread evenly"
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
    """Writes the page to `path`, which is replaced as a whole; the page refers to no other file.

    num_samples: of each stream, at most as many as the dataset has: streams repeat without end.
    """
    num_samples = min(num_samples, len(store))
    streams = {}
    if store.sample_kind.pretrain is not None:
        streams["pretrain"] = pretrain_stream(config, "train")
    if store.sample_kind.instruct is not None:
        streams["instruct"] = instruct_stream(config, "train")
    cards = {
        stage: SampleCards(stream, store, tokenizer, config) for stage, stream in streams.items()
    }
    page = render_page(
        _TEMPLATE,
        title=f"{Path(store.prefix).name}: {store.kind} samples",
        summary=summary_text(store, tokenizer, config.training.seed),
        histograms=[(lengths.name, lengths.histogram()) for lengths in length_statistics(store)],
        sections=[
            (stage, _LEGEND[stage], [drawn.card(number) for number in range(num_samples)])
            for stage, drawn in cards.items()
        ],
    )
    write_text(path, page)
    return path
