"""Full-sentence packing against a packer that walks token by token."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_kosmosg.data import packing
from megatron_kosmosg.data.index_file import write_index
from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.packing import PackedDataset
from megatron_kosmosg.data.packing_index import RowPacker
from megatron_kosmosg.data.sequence import SequenceFormat
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.stored_sample import TOKENS
from megatron_kosmosg.data.tokenizer import Tokenizer
from tests.support.data_helpers import build_dataset, write_tokenizer

QUERIES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packing")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(write_tokenizer(folder))


@pytest.fixture(scope="module")
def stores(folder):
    return {
        kind: SampleStore(build_dataset(folder, kind, 25))
        for kind in ("text", "caption", "interleaved")
    }


def packed(store, tokenizer, capacity, queries=QUERIES, folder=Path("unused")):
    order = SampleOrder("name", len(store), seed=1, stage="pretrain/train")
    dataset = PackedDataset(
        "name", store, order, SequenceFormat(tokenizer, queries), capacity, folder
    )
    return dataset, order


def walk(store, tokenizer, document):
    """Atoms of one document: (tokens, counts as a label, sentence ends here)."""
    raw = store[document]
    image = [tokenizer.image_id] * (QUERIES + 1) + [tokenizer.end_image_id]
    atoms = [[[tokenizer.bos_id], False, False]]
    parts = list(zip(raw.parts, raw.modes, strict=True))
    if store.kind == "caption":
        parts.reverse()  # the image is stored last and read first
    for part, mode in parts:
        if mode != TOKENS:
            atoms.append([image, False, False])
            continue
        ids = [i for i in part.tolist() if i != tokenizer.eos_id]
        pieces = [tokenizer.decode([i]) for i in ids]
        for i, piece in zip(ids, pieces, strict=True):
            atoms.append([[i], True, piece == "."])
    atoms.append([[tokenizer.eos_id], True, True])
    atoms[-2][2] = False  # </s> stays with the last sentence
    return atoms


def reference_rows(store, tokenizer, order, epoch, capacity):
    sentences, sentence = [], []
    for document in order.epoch(epoch).take(np.arange(len(store))):
        for atom in walk(store, tokenizer, int(document)):
            sentence.append(atom)
            if atom[2]:
                sentences.append(sentence)
                sentence = []
    assert not sentence
    rows, row = [], []

    def size(atoms):
        return sum(len(atom[0]) for atom in atoms)

    for sentence in sentences:
        pieces, piece = [], []
        for atom in sentence:
            if size(piece) + len(atom[0]) > capacity:
                pieces.append(piece)
                piece = []
            piece.append(atom)
        for part in [*pieces, piece]:
            if size(row) + size(part) > capacity:
                rows.append(row)
                row = []
            row = row + part
    rows.append(row)
    return [
        (
            [token for atom in row for token in atom[0]],
            [atom[1] for atom in row for _ in atom[0]],
        )
        for row in rows
    ]


@pytest.mark.parametrize("kind", ["text", "caption", "interleaved"])
@pytest.mark.parametrize("capacity", [9, 17, 40, 200])
def test_rows_equal_a_token_by_token_packer(stores, tokenizer, kind, capacity):
    store = stores[kind]
    dataset, order = packed(store, tokenizer, capacity)
    expected = [
        row
        for epoch in range(3)
        for row in reference_rows(store, tokenizer, order, epoch, capacity)
    ]
    for ordinal in reversed(range(len(expected))):  # random access, not in order
        row = dataset.row(ordinal, position=ordinal)
        tokens, counts = expected[ordinal]
        assert row.tokens.tolist() == tokens
        assert row.label_mask.tolist() == counts
        assert len(row.tokens) <= capacity


def test_the_work_on_a_row_does_not_grow_with_its_document(tmp_path, tokenizer):
    """A corpus in one document, as Megatron's own tool makes of a file of one record."""
    sentence = np.array([*tokenizer.encode("the dog ran ."), *tokenizer.encode("a red house .")])
    ids = np.concatenate([np.tile(sentence, 100_000), [tokenizer.eos_id]]).astype(np.int32)
    (tmp_path / "long.bin").write_bytes(ids.tobytes())
    write_index(
        tmp_path / "long.idx", np.dtype(np.int32), np.array([len(ids)], np.int32), None, [1]
    )
    dataset, _ = packed(SampleStore(tmp_path / "long"), tokenizer, 65)
    dataset.row(0, 0)  # makes the index
    tracemalloc.start()
    row = dataset.row(1000, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(row.tokens) == len(row.label_mask) > 50
    assert peak < len(ids) / 8, "bytes"


def test_images_are_whole_and_in_their_slots(stores, tokenizer):
    store = stores["interleaved"]
    dataset, _ = packed(store, tokenizer, 17)
    width = QUERIES + 2
    originals = {raw.info["key"]: raw.images() for raw in (store[i] for i in range(len(store)))}
    seen = 0
    for ordinal in range(60):
        row = dataset.row(ordinal, ordinal)
        assert row.image_mask.sum() == QUERIES * len(row.images)
        for image in row.images:
            block = row.tokens[image.start : image.start + width]
            assert block.tolist() == [tokenizer.image_id] * (width - 1) + [tokenizer.end_image_id]
            mask = row.image_mask[image.start : image.start + width]
            assert mask.tolist() == [False] + [True] * QUERIES + [False]
            assert image.image in originals[image.key]
            after = row.tokens[image.document_end - 1]
            at_row_end = image.document_end == len(row.tokens)
            assert after == tokenizer.eos_id or at_row_end
            seen += 1
    assert seen > 20


def test_epochs_are_shuffled_anew_and_hold_the_same_tokens(stores, tokenizer):
    store = stores["text"]
    dataset, order = packed(store, tokenizer, 40)
    rows = [len(reference_rows(store, tokenizer, order, e, 40)) for e in range(2)]
    epochs = [
        [dataset.row(o, o).tokens for o in range(sum(rows[:e]), sum(rows[: e + 1]))]
        for e in range(2)
    ]
    first, second = (np.concatenate(epoch) for epoch in epochs)
    assert not np.array_equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_a_row_too_short_for_a_image_is_refused(stores, tokenizer):
    with pytest.raises(ValueError, match=r"raise data\.seq_length"):
        packed(stores["caption"], tokenizer, 7)


def test_kinds_that_are_no_documents_are_refused(folder, tokenizer):
    store = SampleStore(build_dataset(folder, "edit", 2))
    with pytest.raises(ValueError, match="of kind edit"):
        packed(store, tokenizer, 40)


def test_an_index_in_files_equals_the_one_in_memory_and_is_built_once(
    stores, tokenizer, tmp_path, monkeypatch
):
    """Blocks of a few documents, so that rows and long sentences cross block ends."""
    for kind, capacity in (("interleaved", 17), ("text", 9), ("caption", 40)):
        expected, _ = packed(stores[kind], tokenizer, capacity)
        rows = [expected.row(o, o) for o in range(70)]
        monkeypatch.setattr(packing, "BLOCK", 3)
        built, _ = packed(stores[kind], tokenizer, capacity, folder=tmp_path / kind)
        for row in rows:
            assert np.array_equal(built.row(row.position, row.position).tokens, row.tokens)
        names = sorted(path.name for path in (tmp_path / kind).iterdir() if path.is_dir())
        assert names and all((tmp_path / kind / name / "sizes.json").exists() for name in names)
        monkeypatch.setattr(packing.PackedDataset, "_write_index", refuse)  # a restart only maps
        again, _ = packed(stores[kind], tokenizer, capacity, folder=tmp_path / kind)
        assert np.array_equal(again.row(69, 69).tokens, rows[69].tokens)
        other, _ = packed(stores[kind], tokenizer, capacity + 1, folder=tmp_path / kind)
        with pytest.raises(AssertionError, match="is built"):  # another capacity is another index
            other.row(0, 0)
        monkeypatch.undo()


def test_the_files_do_not_depend_on_threads_or_blocks(stores, tokenizer, tmp_path, monkeypatch):
    written = []
    for threads, block in ((1, 24), (3, 5), (8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=threads: set(range(n)))
        monkeypatch.setattr(packing, "BLOCK", block)
        dataset, _ = packed(stores["interleaved"], tokenizer, 17, folder=tmp_path / str(threads))
        dataset.row(0, 0)
        files = (tmp_path / str(threads)).rglob("*.i64")
        written.append({file.name: file.read_bytes() for file in files})
    assert written[0] == written[1] == written[2] and len(written[0]) == 3


def refuse(self, epoch, folder):
    raise AssertionError(f"{folder} is built")


def test_half_an_index_is_built_again(stores, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 4)
    first, _ = packed(stores["text"], tokenizer, 17, folder=tmp_path)
    expected = first.row(5, 5).tokens
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "row_starts.i64").write_bytes(b"\0" * 8)
    again, _ = packed(stores["text"], tokenizer, 17, folder=tmp_path)
    assert np.array_equal(again.row(5, 5).tokens, expected)


@pytest.mark.parametrize("capacity", [5, 12, 60])
def test_rows_are_packed_alike_however_the_cuts_arrive(capacity):
    rng = np.random.default_rng(capacity)
    ends = np.cumsum(rng.integers(1, 6, 400))
    expected, start = [0], 0
    for i, end in enumerate(ends):
        if i + 1 == len(ends) or ends[i + 1] - start > capacity:
            expected.append(int(end))
            start = int(end)
    for pieces in (1, 7, 400):
        packer = RowPacker(capacity)
        found = [packer.add(part) for part in np.array_split(ends, pieces)]
        assert np.concatenate([[0], *found, packer.finish()]).tolist() == expected
