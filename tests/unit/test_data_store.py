"""The sample store: what is written comes back, damage is noticed, text is plain Megatron."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.tokenizer import Tokenizer
from tests.support.data_helpers import build_dataset, text_records, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(write_tokenizer(folder))


def test_text_is_a_stock_megatron_token_dataset(folder, tokenizer):
    prefix = build_dataset(folder, "text", 12)
    stock = IndexedDataset(prefix)
    assert len(stock) == 12 and stock.document_indices.tolist() == list(range(13))
    for record, ids in zip(text_records(12), stock, strict=True):
        assert ids.tolist() == [*tokenizer.encode(record["text"]), tokenizer.eos_id]
    store = SampleStore(prefix)
    assert store.kind == "text" and np.array_equal(store[3].parts[0], stock[3])


def test_images_stay_byte_for_byte_and_extra_fields_are_kept(folder, tokenizer):
    prefix = build_dataset(folder, "caption", 5)
    source = folder / "source-caption"
    records = [json.loads(line) for line in (source / "records.jsonl").read_text().splitlines()]
    store = SampleStore(prefix)
    assert len(store) == 5
    for i, record in enumerate(records):
        raw = store[i]
        assert raw.info == {k: record[k] for k in ("key", "caption", "topic")}
        assert raw.images() == [(source / record["image"]).read_bytes()]
        assert raw.tokens()[0].tolist() == tokenizer.encode(record["caption"])


def test_modes_are_readable_by_stock_megatron(folder):
    prefix = build_dataset(folder, "edit", 3)
    stock = IndexedDataset(prefix, multimodal=True)
    assert stock.index.sequence_modes.tolist() == [2, 0, 0, 1, 1] * 3


def test_sentence_table_adds_up_to_the_tokens(folder, tokenizer):
    for kind in ("text", "caption", "interleaved"):
        store = SampleStore(build_dataset(folder, kind, 8, name="-sentences"))
        sentences = store.sentences(tokenizer)
        for i in range(len(store)):
            rows, _ = sentences.take(np.array([i]))
            raw = store[i]
            ids = sum(len(t) for t in raw.tokens()) - (kind == "text")
            assert rows[:, 0].sum() == ids
            assert rows[:, 1].sum() == len(raw.images())


def test_foreign_megatron_datasets_work_as_they_are(folder, tokenizer):
    ours = SampleStore(build_dataset(folder, "text", 9, name="-ours"))
    prefix = str(folder / "foreign")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for i in range(len(ours)):
        builder.add_item(torch.from_numpy(ours.text(i).astype(np.int64)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    foreign = SampleStore(prefix)
    assert foreign.kind == "text" and foreign.manifest is None
    everything = np.arange(len(ours))
    for mine, theirs in zip(
        ours.sentences(tokenizer).take(everything),
        foreign.sentences(tokenizer).take(everything),
        strict=True,
    ):
        assert np.array_equal(mine, theirs)


def test_missing_and_damaged_datasets_are_named(folder, tokenizer):
    with pytest.raises(FileNotFoundError, match="kosmosg preprocess"):
        SampleStore(folder / "nothing")
    prefix = build_dataset(folder, "caption", 4, name="-cut")
    data = (folder / "caption-cut.bin").read_bytes()
    (folder / "caption-cut.bin").write_bytes(data[:-5])
    with pytest.raises(ValueError, match="its index needs"):
        SampleStore(prefix)
    (folder / "caption-cut.bin").write_bytes(data)
    manifest = json.loads((folder / "caption-cut.json").read_text())
    for change, message in (
        ({"num_samples": 5}, "counts 5 samples"),
        ({"format_version": 99}, "format version 99"),
    ):
        (folder / "caption-cut.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            SampleStore(prefix)
    changed = manifest | {"tokenizer_fingerprint": "0"}
    (folder / "caption-cut.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="another SentencePiece model"):
        SampleStore(prefix).check_tokenizer(tokenizer)
