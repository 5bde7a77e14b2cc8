"""The inspection of a dataset: numbers, the page, and what --check finds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.inspection import statistics
from megatron_kosmosg.inspection.check import check_dataset
from megatron_kosmosg.inspection.inspection_page import inspection_config, summary_text, write_page
from megatron_kosmosg.inspection.statistics import Lengths, length_statistics, token_use
from tests.support.data_helpers import break_image, build_dataset, main_of, write_tokenizer

KINDS = ("text", "caption", "interleaved", "edit", "compositional")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    for kind in KINDS:
        build_dataset(folder, kind, 9)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(write_tokenizer(folder))


def problems(prefix, tokenizer) -> list[str]:
    store = SampleStore(prefix)
    found = check_dataset(store, tokenizer, 2, lambda done, total: None)
    return [f"{problem.key}: {problem.reason}" for problem in found]


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_dataset_has_no_problems(folder, tokenizer, kind):
    assert problems(folder / kind, tokenizer) == []


def test_lengths_come_from_the_index_and_equal_the_samples(folder):
    store = SampleStore(folder / "compositional")
    tokens, images, sizes = length_statistics(store)
    raws = [store[i] for i in range(len(store))]
    assert tokens.values.tolist() == [sum(map(len, raw.tokens())) for raw in raws]
    assert images.values.tolist() == [len(raw.images()) for raw in raws]
    assert sizes.values.tolist() == [sum(map(len, raw.images())) for raw in raws]
    text = SampleStore(folder / "text")
    (found,) = length_statistics(text)
    assert found.values.tolist() == [len(text.text(i)) for i in range(9)]


def test_histogram_counts_every_sample_once():
    values = np.array([3, 3, 4, 40, 41, 100])
    bars = Lengths("x", values).histogram()
    for low, high, count in bars:
        assert count == ((values >= low) & (values <= high)).sum()
    assert sum(count for *_, count in bars) == 6 and bars[0][0] == 3 and bars[-1][1] == 100
    assert Lengths("x", np.array([5, 5])).histogram() == [(5, 5, 2)]


def test_token_use_counts_words_of_the_text(folder, tokenizer):
    use = token_use(SampleStore(folder / "text"), tokenizer, 100, 0)
    lines = (folder / "source-text" / "records.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert use.num_tokens == sum(len(tokenizer.encode(text)) for text in texts)
    assert use.tokens_per_word == use.num_tokens / sum(len(text.split()) for text in texts)
    assert use.num_samples == 9 and use.num_unknown == 0
    assert "." in [text for text, _ in use.most_frequent[:2]]


def test_check_names_the_sample_of_each_kind_of_damage(folder, tokenizer):
    found = problems(break_image(folder, "edit", "-picture", 3, 1), tokenizer)
    assert found == ["edit-3: image 1: the image is not a known image format"]
    found = problems(break_image(folder, "compositional", "-mask", 2, 2), tokenizer)
    assert [line.split(":")[0] for line in found] == ["compositional-2"]

    prefix = build_dataset(folder, "caption", 5, name="-token")
    store = SampleStore(prefix)
    pointer = store.shards[0].sequences.index.pointers[3 * 2 + 1]  # tokens of sample 2
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.seek(int(pointer))
        file.write(np.array([tokenizer.image_id], "<i4").tobytes())
    found = problems(prefix, tokenizer)
    assert found[0] == f"caption-2: token id {tokenizer.image_id} is no text token"

    prefix = build_dataset(folder, "compositional", 3, name="-span")
    data = Path(f"{prefix}.bin").read_bytes()
    assert b'"span":[2,12]' in data
    Path(f"{prefix}.bin").write_bytes(data.replace(b'"span":[2,12]', b'"span":[4,12]', 1))
    (line,) = problems(prefix, tokenizer)
    assert "the span reads 'd circle', not 'red circle'" in line

    prefix = build_dataset(folder, "interleaved", 4, name="-manifest")
    manifest = Path(f"{prefix}.json")
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"num_images": fields["num_images"] + 1}))
    (line,) = problems(prefix, tokenizer)
    assert re.search(r"states num_images \d+, found \d+", line)


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_shows_samples_as_the_streams_give_them(folder, tokenizer, kind, tmp_path):
    store = SampleStore(folder / kind)
    model = str(write_tokenizer(folder))
    config = inspection_config(store.prefix, None, model, 1, tmp_path)
    page = write_page(tmp_path / "page.html", store, tokenizer, config, 3).read_text()
    stages = {"text": 1, "interleaved": 1, "caption": 2, "edit": 1, "compositional": 1}[kind]
    assert page.count("<article>") == 3 * stages
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert ("target" in page.split("</style>")[1]) == (kind not in ("text", "interleaved"))
    text = summary_text(store, tokenizer, 1)
    assert f"{len(store):,} samples" in text and "text tokens" in text
    if kind != "text":
        assert page.count("data:image/") >= 3
    if kind == "compositional":
        assert page.count("<figure") == 3 and "red circle" in page


def test_the_tools_exit_code_says_what_was_found(folder, monkeypatch, capsys):
    model = str(write_tokenizer(folder))
    common = ["--tokenizer-model", model, "--no-page"]
    broken = break_image(folder, "caption", "-exit", 2, 0)
    for prefix, more, code, message in (
        (str(folder / "caption"), ["--check"], 0, "9 samples, 0 problems"),
        (broken, ["--check"], 1, "2 (caption-2): image 0:"),
        (broken, [], 0, "8 samples"),
        (str(folder / "none"), ["--check"], 2, "no dataset at"),
    ):
        found = main_of("tools/inspect_data.py", [prefix, *common, *more], monkeypatch)
        shown = capsys.readouterr()
        assert found == code and message in shown.out + shown.err
    assert not Path(f"{broken}.html").exists()


def test_lengths_of_a_large_dataset_are_those_of_samples_spread_over_it(folder, monkeypatch):
    store = SampleStore(build_dataset(folder, "caption", 10, name="-large"))
    everything = {found.name: found.values for found in length_statistics(store)}
    monkeypatch.setattr(statistics, "MOST_LOOKED_AT", 4)
    for found in length_statistics(store):
        assert found.values.tolist() == everything[found.name][[0, 2, 5, 7]].tolist()
