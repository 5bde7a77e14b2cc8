"""A kind of sample that this file alone defines goes all the way: files, pages, stages, plans.

Nothing of it is known to the package but its line in the table of kinds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.kinds.kind import (
    Captions,
    Conversion,
    Converted,
    ImageSize,
    PackedDocuments,
    Prompts,
    SampleKind,
    UsualSize,
)
from megatron_kosmosg.data.kinds.record import Record, Rejected, extra_fields
from megatron_kosmosg.data.random_keys import SampleKey
from megatron_kosmosg.data.samples import Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.stored_sample import IMAGE, TOKENS, PartSizes, RawSample, StoredPart
from megatron_kosmosg.planning.gpus import GPUS
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.toy_captions import caption as toy_caption
from megatron_kosmosg.toy.world import sample_scene
from tests.support.data_helpers import main_of, noise_image, write_jsonl
from tests.support.ranks import run_ranks

SHOUTED = 5
"""The record whose words the kind's own check takes exception to."""
MODEL = str(assets.path() / "sentencepiece.model")
STABLE_DIFFUSION = assets.path() / "stable-diffusion"


def convert(record: Record, use: Conversion) -> Converted:
    """{"key", "before", "words", "after"}."""
    words, ids = use.text_field(record.fields, "words")
    if words == "nothing":
        raise Rejected("words that say nothing")
    images = [use.image(record, record.fields, name) for name in ("before", "after")]
    info = {"key": record.key, "words": words}
    info |= extra_fields(record.fields, ("key", "words", "before", "after"))
    parts = [
        StoredPart.json(info),
        *(StoredPart(IMAGE, data) for data in images),
        StoredPart.tokens(ids),
    ]
    return Converted(parts)


class RecolourPrompts:
    """<s> words image; the recoloured image is the target."""

    def __init__(self, sequence_format: SequenceFormat) -> None:
        self._format = sequence_format

    def length(self, sizes: PartSizes, draws: SampleKey) -> int:
        return 1 + sizes[2][1] + self._format.image_length

    def __call__(self, raw: RawSample, draws: SampleKey) -> Prompt:
        builder = SequenceBuilder(self._format).add_start().add_text(raw.parts[2])
        builder.add_image(raw.parts[0].tobytes())
        return builder.prompt(memoryview(raw.parts[1]), raw.info["words"])


def check(raw: RawSample, sizes: Sequence[ImageSize]) -> Iterator[str]:
    if sizes[0] != sizes[1]:
        yield f"pictures of {sizes[0]} and {sizes[1]} pixels"
    if raw.info["shouted"]:
        yield "the words are shouted"


RECOLOUR = SampleKind(
    name="recolour",
    record='{"key", "before", "words", "after"}',
    fields=("before", "words", "after"),
    convert=convert,
    part_modes=(IMAGE, IMAGE, TOKENS),
    check=check,
    pretrain=PackedDocuments(images_per_row=30.0, reading_order=lambda modes: (2, 1)),
    align=Captions(tokens=2, words=lambda raw: raw.info["words"], usual=UsualSize(33, 0.0)),
    instruct=Prompts(
        maker=lambda sequence_format, data: RecolourPrompts(sequence_format),
        target=lambda raw: memoryview(raw.parts[1]),
        usual=UsualSize(length=77, images=1.0),
    ),
)


@pytest.fixture(scope="module")
def table():
    """The table of kinds with one more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, RECOLOUR.name, RECOLOUR)
        yield patch


@pytest.fixture(scope="module")
def folder(table, tmp_path_factory) -> Path:
    """Datasets of the new kind and of captions, by the command, with the cached latents of both."""
    folder = tmp_path_factory.mktemp("new-kind")
    recolour, captions = [], []
    for i in range(24):
        words = toy_caption(sample_scene(i, 1, False), "mix", i)
        for name in ("before", "after"):
            (folder / f"{i}-{name}.png").write_bytes(noise_image(i, 32, 32))
        images = {"before": f"{i}-before.png", "after": f"{i}-after.png"}
        recolour.append({"key": f"r{i}", "say": words, "shouted": i == SHOUTED} | images)
        captions.append({"key": f"c{i}", "caption": words, "image": f"{i}-after.png"})
    recolour.append(recolour[0] | {"key": "bad", "say": "nothing"})
    for name, records in (("recolour", recolour), ("caption", captions)):
        source = write_jsonl(folder / f"{name}.jsonl", records)
        arguments = ["--kind", name, "--input", str(source), "--tokenizer-model", MODEL]
        arguments += ["--output-prefix", str(folder / name)]
        if name == "recolour":
            arguments += ["--field", "words=say", "--workers", "2"]
        assert main_of("tools/preprocess_data.py", arguments, table) == 0
        arguments = [str(folder / name), "--stable-diffusion", str(STABLE_DIFFUSION)]
        assert main_of("tools/cache_latents.py", [*arguments, "--image-size", "32"], table) == 0
    return folder


def test_the_command_writes_it_and_says_why_records_are_left_out(folder, table, capsys):
    store = SampleStore(folder / "recolour")
    assert (store.kind, len(store), store.manifest.num_images) == ("recolour", 24, 48)
    assert store[3].info["words"] and store[3].modes == [IMAGE, IMAGE, TOKENS]
    (line,) = (folder / "recolour.rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "words that say nothing"
    with pytest.raises(SystemExit):
        main_of("tools/preprocess_data.py", ["--help"], table)
    assert '  recolour       {"key", "before", "words", "after"}' in capsys.readouterr().out


def test_options_and_formats_of_other_kinds_are_refused(folder, table, capsys):
    arguments = ["--kind", "recolour", "--tokenizer-model", MODEL, "--output-prefix", "x"]
    source = ["--input", str(folder / "recolour.jsonl")]
    for more, message in (
        ([*source, "--max-images", "2"], "--max-images is for --kind interleaved, not recolour"),
        ([*source, "--field", "caption=say"], "--kind recolour has no field caption; it has key, "),
        (["--input", str(folder)], "is a folder; give its files: --input "),
    ):
        assert main_of("tools/preprocess_data.py", [*arguments, *more], table) == 2
        assert message in capsys.readouterr().err


def test_its_page_shows_it_as_each_stage_sees_it_and_its_own_check_speaks(folder, table, capsys):
    page, config = folder / "page.html", folder / "inspect.yaml"
    config.write_text(f"include: toy_base\nstage: instruct\nlogging: {{output_dir: {folder}}}\n")
    arguments = [str(folder / "recolour"), "--config", str(config), "--samples", "3"]
    arguments += ["--check", "--output", str(page)]
    assert main_of("tools/inspect_data.py", arguments, table) == 1
    output = capsys.readouterr().out
    assert f"{SHOUTED} (r{SHOUTED}): the words are shouted" in output
    assert "24 samples, 1 problems" in output
    html = page.read_text()
    assert "As pretrain sees it" in html and "As instruct sees it" in html
    assert "recolour samples" in html and html.count('<figure class="target">') == 3


def train(arguments: list[str]) -> int:
    """One rank of a run, with the kind in its table."""
    from megatron_kosmosg.train import main

    KINDS[RECOLOUR.name] = RECOLOUR
    return main(arguments)


def settings(folder: Path, stage: str) -> list[str]:
    """The command line of a run over both datasets, under names that are no kinds."""
    found = ["--config", "toy_base", f"stage={stage}", f"logging.output_dir={folder / stage}"]
    for name, kind, weight in (("mine", "recolour", 2), ("laion", "caption", 1)):
        found += [f"data.blend.{name}.path={folder / kind}", f"data.blend.{name}.weight={weight}"]
    found += ["training.train_iters=2", "checkpoint.save_interval=2", "logging.log_interval=1"]
    found += ["training.micro_batch_size=3", "training.global_batch_size=3", "data.seq_length=96"]
    if stage == "instruct":
        found.append("data.latent_cache=latents")
    if stage != "pretrain":
        previous = {"align": "pretrain", "instruct": "align"}[stage]
        found.append(f"checkpoint.load={folder / previous}")
    found += ["optimizer.lr_warmup_iters=1", "logging.tensorboard=false"]
    return [*found, "logging.image_interval=0"]


def test_every_stage_trains_on_it_in_a_mixture(folder):
    for stage in ("pretrain", "align", "instruct"):
        assert run_ranks(1, train, settings(folder, stage)) == [0]
        lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
        losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
        assert len(losses) == 2 and np.isfinite(losses).all(), stage


@pytest.mark.parametrize(
    ("stage", "length", "images"),
    [("pretrain", 96, 30 * 96 / 2048), ("align", 33, 0.0), ("instruct", 77, 1.0)],
)
def test_plans_reckon_with_its_usual_size(folder, table, stage, length, images):
    path = folder / f"{stage}.json"
    arguments = ["--gpu", next(iter(GPUS)), "--num-gpus", "1", "--json", str(path)]
    assert main_of("tools/plan.py", [*settings(folder, stage), *arguments], table) == 0
    (sample,) = [s for s in json.loads(path.read_text())["samples"] if s["dataset"] == "mine"]
    assert sample["kind"] == "recolour" and sample["length"] == length
    assert math.isclose(sample["share"], 2 / 3) and math.isclose(sample["prompt_images"], images)


def test_a_kind_that_is_not_in_the_table_is_an_error_that_names_the_kinds(folder, monkeypatch):
    monkeypatch.delitem(KINDS, RECOLOUR.name)
    with pytest.raises(ValueError, match=r"recolour\.json: kind recolour is not known; .* caption"):
        SampleStore(folder / "recolour")
