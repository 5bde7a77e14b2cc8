"""The streams of the three stages: batches, determinism over layouts, bad images."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from megatron_kosmosg.data import manifest as manifest_module
from megatron_kosmosg.data.loader import MicroBatchIterator
from megatron_kosmosg.data.normalise import normalise, normalise_batch, target_pixels
from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.streams import align_stream, instruct_stream, pretrain_stream
from megatron_kosmosg.data.tokenizer import Tokenizer
from tests.support.data_helpers import (
    break_image,
    build_dataset,
    overwrite_image,
    run_config,
    write_clip_tokenizer,
    write_tokenizer,
)
from tests.support.stream_rows import GLOBAL_BATCH, global_stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    write_clip_tokenizer(folder)
    for kind in ("text", "caption", "interleaved", "edit", "compositional"):
        build_dataset(folder, kind, 20)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(write_tokenizer(folder))


def prefixes(folder: Path, **weights: float) -> dict[str, tuple[str, float]]:
    return {kind: (str(folder / kind), weight) for kind, weight in weights.items()}


def make_stream(folder: Path, stage: str, split: str = "train", **data):
    if stage == "pretrain":
        blend = prefixes(folder, text=5, caption=5, interleaved=2)
        return pretrain_stream(run_config(folder, stage, blend, **data), split)
    if stage == "align":
        return align_stream(run_config(folder, stage, prefixes(folder, caption=1), **data), split)
    blend = prefixes(folder, compositional=2, edit=2, caption=1)
    return instruct_stream(run_config(folder, stage, blend, **data), split)


@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_global_stream_is_the_same_for_every_layout_restart_and_thread_count(folder, stage):
    expected = global_stream(make_stream(folder, stage), 1, GLOBAL_BATCH, 0, 0, 4)
    assert len(set(expected)) > 15
    for dp_size, micro_batch_size, num_workers in ((1, 3, 2), (2, 3, 1), (3, 2, 4), (4, 1, 0)):
        for balance in (False, True):
            found = global_stream(
                make_stream(folder, stage), dp_size, micro_batch_size, num_workers, 0, 4, balance
            )
            assert found == expected
    restarted = global_stream(make_stream(folder, stage), 2, 2, 2, 3, 1, True)
    assert restarted == expected[3 * GLOBAL_BATCH :]


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_lengths_from_the_index_are_those_of_the_samples(folder, stage):
    """With prompts that are too long for the limit, so that replacements are met as well."""
    if stage == "instruct":
        short = run_config(folder, stage, prefixes(folder, caption=1), seq_length=7)
        replaced = 0
        for stream in (make_stream(folder, stage), instruct_stream(short, "train")):
            samples = [stream[p] for p in range(120)]
            found = stream.lengths(range(120)).tolist()
            assert found == [len(sample.prompt.tokens) for sample in samples]
            replaced += sum(sample.replacement > 0 for sample in samples)
        assert replaced
    else:
        stream = make_stream(folder, stage, seq_length=7)
        samples = [stream[p] for p in range(120)]
        assert stream.lengths(range(120)) is None
        for start in range(0, 120, 6):
            longest = max(len(sample.tokens) for sample in samples[start : start + 6])
            assert stream.pad_to([], range(start, start + 6)) == longest


def test_captions_that_clip_would_cut_never_widen_their_batch(folder):
    """Their replacements are not longer than what pad_to counted, and fit."""
    config = run_config(folder, "align", prefixes(folder, caption=1))
    small = dataclasses.replace(config.model.aligner, num_queries=18)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, aligner=small))
    stream, cut = align_stream(config, "train"), align_stream(config, "train")
    captions = {
        tuple(raw.tokens()[0]): raw.info["caption"]
        for store in (SampleStore(folder / "caption"),)
        for raw in (store[i] for i in range(len(store)))
    }
    encode = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    replaced = 0
    for start in range(0, 60, 6):
        samples = [stream[p] for p in range(start, start + 6)]
        width = cut.pad_to([], range(start, start + 6))
        for sample in samples:
            caption = captions[tuple(sample.tokens[1:])]
            assert len(encode(caption)["input_ids"]) <= 18
            assert len(sample.tokens) <= width
        replaced += width > max(len(sample.tokens) for sample in samples)
    assert replaced, "no caption was too long for the text encoder: the test shows nothing"


def test_token_counts_are_balanced_over_ranks_and_micro_batches(folder):
    stream = make_stream(folder, "instruct")
    counted: dict[bool, list[int]] = {}
    computed: dict[bool, int] = {}
    for balance in (False, True):
        spread, work = [], 0
        loaders = [MicroBatchIterator(stream, 48, 4, r, 3, 0, 0, balance) for r in range(3)]
        for _ in range(6):  # global batches of four micro-batches a rank
            tokens = np.zeros((3, 4), np.int64)
            for rank, loader in enumerate(loaders):
                for k in range(4):
                    batch = next(loader)
                    tokens[rank, k] = (~batch["padding_mask"]).sum()
                    work += batch["tokens"].numel()
            spread.append(int(np.ptp(tokens.sum(1))))
        counted[balance], computed[balance] = spread, work
    longest = stream.lengths(range(6 * 48)).max()
    assert max(counted[True]) <= longest < max(counted[False])
    assert computed[True] < 0.9 * computed[False], "less padding is computed"


def test_micro_batches_without_images_are_empty_tensors(folder):
    stream = instruct_stream(run_config(folder, "instruct", prefixes(folder, caption=1)), "train")
    batch = stream.collate([stream[0], stream[1]], 1)
    assert batch["pixel_values"].shape == (0, 3, 8, 8)
    assert batch["target_pixel_values"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_other_seed_split_and_epoch_differ(folder, stage):
    train = global_stream(make_stream(folder, stage), 1, 4, 0, 0, 8)
    heldout = global_stream(make_stream(folder, stage, "heldout"), 1, 4, 0, 0, 8)
    assert train != heldout
    assert train[:48] != train[48:]


def test_an_epoch_decides_anew_on_words_and_backgrounds_of_the_same_sample(folder):
    config = run_config(folder, "instruct", prefixes(folder, compositional=1))
    stream = instruct_stream(config, "train")
    seen: dict[str, set] = {}
    for position in range(20 * 8):  # eight epochs
        sample = stream[position]
        choices = (len(sample.prompt.tokens), sample.prompt.images[0].mask is None)
        seen.setdefault(sample.key, set()).add(choices)
    assert len(seen) == 20
    assert np.mean([len(choices) for choices in seen.values()]) > 2.5


def test_instruct_batch_has_the_agreed_keys_and_shapes(folder, tokenizer):
    stream = make_stream(folder, "instruct")
    samples = [stream[p] for p in range(10)]
    width = stream.pad_to(samples, range(10))
    batch = stream.collate(samples, width)
    assert width == stream.lengths(range(10)).max() == batch["tokens"].shape[1]
    images = sum(len(sample.prompt.images) for sample in samples)
    assert {name: (tuple(v.shape), v.dtype) for name, v in batch.items()} == {
        "tokens": ((10, width), torch.int64),
        "image_mask": ((10, width), torch.bool),
        "padding_mask": ((10, width), torch.bool),
        "pixel_values": ((images, 3, 8, 8), torch.uint8),
        "target_pixel_values": ((10, 3, 16, 16), torch.uint8),
        "target_weights": ((10,), torch.float32),
        "stream_positions": ((10,), torch.int64),
        "replacements": ((10,), torch.int64),
        "bad_samples": ((), torch.int64),
    }
    assert batch["stream_positions"].tolist() == list(range(10))
    assert int(batch["image_mask"].sum()) == 4 * images
    assert (batch["tokens"][batch["image_mask"]] == tokenizer.image_id).all()
    assert (batch["tokens"][:, 0] == tokenizer.bos_id).all()
    assert ((batch["tokens"] == tokenizer.pad_id) == batch["padding_mask"]).all()
    assert not (batch["tokens"] == tokenizer.eos_id).any()
    targets = normalise(batch["target_pixel_values"], target_pixels(16))
    assert -1 <= targets.min() < -0.5 and 0.5 < targets.max() <= 1
    names = [sample.dataset for sample in samples]
    counts = [names.count(name) for name in ("compositional", "edit", "caption")]
    assert counts == [4, 4, 2]


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_packed_rows_name_their_tokens_in_order(folder, stage):
    plain, stream = make_stream(folder, stage), make_stream(folder, stage, pack_prompts=True)
    samples = [stream[p] for p in range(6)]
    width = stream.pad_to(samples, range(12))
    assert width <= plain.pad_to(samples, range(12))
    batch, padded = stream.collate(samples, width), plain.collate(samples, width)
    assert "packed" not in padded
    assert batch["tokens"].flatten()[batch["packed"]].tolist() == [
        int(token) for row in samples for token in row_tokens(row)
    ]
    for name, value in padded.items():
        assert torch.equal(batch[name], value), name


def row_tokens(sample) -> np.ndarray:
    return sample.tokens if hasattr(sample, "tokens") else sample.prompt.tokens


def test_pixel_values_follow_rows_then_positions(folder):
    stream = make_stream(folder, "instruct")
    samples = [stream[p] for p in range(6)]
    together = stream.collate(samples, 1)["pixel_values"]
    apart = [stream.collate([sample], 1)["pixel_values"] for sample in samples]
    assert torch.equal(together, torch.cat(apart))


def test_pretrain_batch_labels_are_the_next_tokens_and_only_text_counts(folder, tokenizer):
    stream = make_stream(folder, "pretrain")
    samples = [stream[p] for p in range(24)]
    batch = stream.collate(samples, stream.pad_to(samples, range(24)))
    assert batch["tokens"].shape == batch["labels"].shape == (24, 60)
    for b, row in enumerate(samples):
        n = len(row.tokens) - 1
        assert torch.equal(batch["tokens"][b, 1:n], batch["labels"][b, : n - 1])
        assert batch["labels"][b, n - 1] == row.tokens[-1]
        assert batch["padding_mask"][b].tolist() == [False] * n + [True] * (60 - n)
    special = [tokenizer.bos_id, tokenizer.pad_id, tokenizer.image_id, tokenizer.end_image_id]
    expected = ~torch.isin(batch["labels"], torch.tensor(special))
    assert torch.equal(batch["loss_mask"], expected.float())
    assert batch["loss_mask"].dtype == torch.float32
    assert (batch["labels"] == tokenizer.eos_id)[batch["loss_mask"] > 0].any()
    assert batch["image_mask"].sum() == 4 * len(batch["pixel_values"]) > 0


def test_align_batch_pads_to_the_global_batch_and_tokenises_for_clip(folder, tokenizer):
    stream = make_stream(folder, "align")
    whole = range(12)
    samples = [stream[p] for p in range(4)]
    width = stream.pad_to(samples, whole)
    order, store = SampleOrder("caption", 20, 7, "align/train"), SampleStore(folder / "caption")
    assert width == 1 + max(len(store[order[p]].tokens()[0]) for p in whole)
    batch = stream.collate(samples, width)
    assert batch["tokens"].shape == (4, width) and not batch["image_mask"].any()
    assert batch["pixel_values"].shape == (0, 3, 8, 8)
    assert batch["clip_tokens"].shape == (4, 30) and batch["clip_tokens"].dtype == torch.int64
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    captions = {}
    for i in range(len(store)):
        raw = store[i]
        captions[tuple(tokenizer.encode(raw.info["caption"]))] = raw.info["caption"]
    for row, clip_row, padding in zip(
        batch["tokens"], batch["clip_tokens"], batch["padding_mask"], strict=True
    ):
        caption = captions[tuple(row[~padding][1:].tolist())]
        expected = clip(caption, padding="max_length", max_length=30, truncation=True)["input_ids"]
        assert clip_row.tolist() == expected


def test_align_leaves_out_captions_that_clip_would_cut(folder):
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    store = SampleStore(folder / "caption")
    lengths = [len(clip(store[i].info["caption"])["input_ids"]) for i in range(len(store))]
    assert min(lengths) <= 30 < max(lengths), "the filter has something to do"
    stream = make_stream(folder, "align")
    rows = [stream[p].clip_tokens for p in range(60)]
    ends = [row.tolist().index(clip.eos_token_id) for row in rows]
    assert max(ends) <= 29


def test_bad_image_costs_one_sample_is_reported_and_replaced_by_key(folder, caplog):
    prefix = break_image(folder, "edit", "-broken", 3, 0)
    config = run_config(folder, "instruct", {"edits": (prefix, 1.0)})
    stream = instruct_stream(config, "train")
    hit = [p for p in range(8) if stream[p].key == "edit-3"]
    assert len(hit) == 1, "an epoch holds every sample once"
    with caplog.at_level(logging.WARNING):
        batch = stream.collate([stream[p] for p in range(8)], 1)
    assert batch["bad_samples"] == 1
    assert "dataset edits, sample edit-3" in caplog.text
    again = instruct_stream(config, "train")
    alone = again.collate([again[hit[0]]], 1)
    assert torch.equal(alone["target_pixel_values"][0], batch["target_pixel_values"][hit[0]])
    healthy = [p for p in range(8) if p != hit[0]]
    clean = again.collate([again[p] for p in healthy], 1)
    assert torch.equal(clean["target_pixel_values"], batch["target_pixel_values"][healthy])
    assert clean["bad_samples"] == 0
    assert batch["stream_positions"].tolist() == list(range(8))
    assert batch["target_weights"].tolist() == [1.0] * 8


def test_bad_target_is_reported_and_counts_for_nothing(folder, caplog):
    prefix = build_dataset(folder, "edit", 8, name="-no-target")
    config = run_config(folder, "instruct", {"edits": (prefix, 1.0)})
    whole = instruct_stream(config, "train")
    expected = whole.collate([whole[p] for p in range(8)], 1)
    overwrite_image(prefix, 3, 1)
    stream = instruct_stream(config, "train")
    samples = [stream[p] for p in range(8)]
    with caplog.at_level(logging.WARNING):
        batch = stream.collate(samples, 1)
    assert "dataset edits, sample edit-3" in caplog.text and "counts for nothing" in caplog.text
    assert batch["bad_samples"] == 1
    weights = [float(sample.key != "edit-3") for sample in samples]
    assert batch["target_weights"].tolist() == weights and sum(weights) == 7
    expected["target_pixel_values"][weights.index(0.0)] = 128  # the level next to the mean
    for key in ("tokens", "pixel_values", "target_pixel_values"):
        assert torch.equal(batch[key], expected[key]), key


def test_bad_image_in_a_row_silences_its_document_only(folder, tokenizer):
    prefix = break_image(folder, "caption", "-row", 5, 0)
    config = run_config(folder, "pretrain", {"captions": (prefix, 1.0)})
    stream = pretrain_stream(config, "train")
    rows = [stream[p] for p in range(20)]
    hit = next(i for i, row in enumerate(rows) if any(im.key == "caption-5" for im in row.images))
    row = rows[hit]
    image = next(im for im in row.images if im.key == "caption-5")
    batch = stream.collate([row], 60)
    expected = row.label_mask[1:].astype(np.float32)
    expected[image.start : image.document_end - 1] = 0
    n = len(row.tokens) - 1
    assert batch["loss_mask"][0, :n].tolist() == expected.tolist()
    assert expected.sum() < row.label_mask[1:].sum()
    place = row.images.index(image)
    blank = normalise_batch(batch, config)["pixel_values"][place]
    std = torch.tensor(config.data.image_std)[:, None, None]
    assert (blank * std).abs().max() * 255 <= 0.5, "the mean colour, as near as bytes come to it"
    assert batch["bad_samples"] == 1


def test_wrong_configurations_name_the_key(folder):
    blend = prefixes(folder, text=1)
    with pytest.raises(ValueError, match="instruct reads caption, edit, compositional"):
        instruct_stream(run_config(folder, "instruct", blend), "train")
    with pytest.raises(ValueError, match="align reads caption"):
        align_stream(run_config(folder, "align", blend), "train")
    with pytest.raises(ValueError, match=r"data\.heldout is empty"):
        config = run_config(folder, "align", blend)
        data = dataclasses.replace(config.data, heldout={})
        align_stream(dataclasses.replace(config, data=data), "heldout")
    with pytest.raises(FileNotFoundError, match="write it with"):
        wrong = {"x": (str(folder / "missing"), 1.0)}
        pretrain_stream(run_config(folder, "pretrain", wrong), "train")
    with pytest.raises(ValueError, match=r"data\.blend\.text\.kind=caption.* is of kind text"):
        config = run_config(folder, "pretrain", blend)
        stated = {"text": dataclasses.replace(config.data.blend["text"], kind="caption")}
        data = dataclasses.replace(config.data, blend=stated)
        pretrain_stream(dataclasses.replace(config, data=data), "train")
    with pytest.raises(ValueError, match=r"model\.vocab_size"):
        config = run_config(folder, "pretrain", blend)
        model = dataclasses.replace(config.model, vocab_size=99)
        pretrain_stream(dataclasses.replace(config, model=model), "train")
    with pytest.raises(ValueError, match=r"longer than\s+data\.seq_length=3"):
        config = run_config(folder, "instruct", prefixes(folder, edit=1), seq_length=3)
        _ = instruct_stream(config, "train")[0]


def test_manifest_counts_what_is_stored(folder):
    manifest = json.loads((folder / "compositional.json").read_text())
    store = SampleStore(folder / "compositional")
    raws = [store[i] for i in range(len(store))]
    assert manifest["num_samples"] == 20 and manifest["kind"] == "compositional"
    assert manifest["num_images"] == sum(len(raw.images()) for raw in raws)
    assert manifest["num_tokens"] == sum(len(t) for raw in raws for t in raw.tokens())
    assert manifest["format_version"] == manifest_module.FORMAT_VERSION


def test_ranks_with_and_without_the_unet_read_their_parts_of_the_same_batch(folder):
    config = run_config(folder, "instruct", prefixes(folder, caption=1, edit=1))
    batches = {}
    for reads in ("all", "prompts", "targets"):
        stream = instruct_stream(config, "train", reads=reads)
        samples = [stream[p] for p in range(6)]
        batches[reads] = stream.collate(samples, stream.pad_to(samples, range(6)))
    everything = batches["all"]
    shared = {"stream_positions", "replacements", "bad_samples"}
    targets = {"target_pixel_values", "target_weights"}
    assert batches["targets"].keys() == shared | targets
    assert batches["prompts"].keys() == everything.keys() - targets
    for reads in ("prompts", "targets"):
        for key, value in batches[reads].items():
            assert torch.equal(value, everything[key]), key


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_a_stage_without_the_image_tower_has_the_batch_of_the_one_that_decodes(folder, stage):
    kind, key = ("caption", "caption-5") if stage == "pretrain" else ("edit", "edit-3")
    prefix = break_image(folder, kind, f"-told-{stage}", int(key[-1]), 0)
    config = run_config(folder, stage, {kind: (prefix, 1.0)})
    make = {"pretrain": pretrain_stream, "instruct": instruct_stream}[stage]
    flag = {"pretrain": "decodes", "instruct": "decodes_prompts"}[stage]
    decodes, blind = make(config, "train"), make(config, "train", **{flag: False})
    samples = [decodes[p] for p in range(8)]
    whole = decodes.collate(samples, decodes.pad_to(samples, range(8)))
    assert whole["bad_samples"] > 0 and len(whole["pixel_values"])
    alone = blind.collate(samples, blind.pad_to(samples, range(8)))
    assert not alone["replacements"].any() and len(alone["pixel_values"]) == 0
    told = blind.collate(samples, alone["tokens"].shape[1], whole["replacements"].tolist())
    assert told.keys() == whole.keys() and len(told.pop("pixel_values")) == 0
    for name, value in told.items():
        assert torch.equal(value, whole[name]), name
    assert any(not torch.equal(alone[name], value) for name, value in told.items())
