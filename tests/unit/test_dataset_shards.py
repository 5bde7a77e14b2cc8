"""A dataset in shards: the joined one's samples and streams; what is wrong is said by name."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_kosmosg.cli import dataset_shards as command
from megatron_kosmosg.config.dataset_prefixes import missing_files
from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data import packing
from megatron_kosmosg.data.dataset_files import files_of_all_shards
from megatron_kosmosg.data.index_file import index_header, write_index
from megatron_kosmosg.data.manifest import Manifest, is_manifest
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.streams import align_stream, instruct_stream, pretrain_stream
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.inspection.check import check_dataset
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from megatron_kosmosg.preprocess.shards_of_dataset import check_shards, list_shards
from tests.support.data_helpers import (
    image_records,
    run_config,
    text_records,
    write_clip_tokenizer,
    write_jsonl,
    write_tokenizer,
)
from tests.support.stream_rows import GLOBAL_BATCH, global_stream

KINDS = ("text", "caption", "interleaved", "edit", "compositional")
SIZES = (7, 1, 12)
"""Samples of the shards."""


def written(folder: Path, kind: str, prefix: Path, inputs: list[Path]) -> str:
    model = str(write_tokenizer(folder))
    job = PreprocessJob(kind, tuple(map(str, inputs)), model, str(prefix))
    preprocess(job, lambda *_: None)
    return str(prefix)


def in_parts(folder: Path, kind: str, sizes=SIZES) -> tuple[str, list[str]]:
    """Prefix of a dataset in one piece, and of datasets of the same records, part by part."""
    source = folder / f"source-{kind}"
    count = sum(sizes)
    records = text_records(count) if kind == "text" else image_records(source, kind, count)
    inputs, first = [], 0
    for number, size in enumerate(sizes):
        inputs.append(write_jsonl(source / f"{number}.jsonl", records[first : first + size]))
        first += size
    joined = written(folder, kind, folder / "joined" / kind, inputs)
    parts = [
        written(folder, kind, folder / f"disk{number % 2}" / f"{kind}-{number}", [input_file])
        for number, input_file in enumerate(inputs)
    ]
    return joined, parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """joined/KIND, and KIND over shards in two other folders."""
    folder = tmp_path_factory.mktemp("shards")
    for name in ("joined", "disk0", "disk1"):
        (folder / name).mkdir()
    write_clip_tokenizer(folder)
    for kind in KINDS:
        _, parts = in_parts(folder, kind)
        list_shards(str(folder / kind), parts)
    return folder


@pytest.fixture
def captions(tmp_path) -> tuple[Path, list[str]]:
    """A dataset in shards to be spoilt, and its shards."""
    for name in ("joined", "disk0", "disk1"):
        (tmp_path / name).mkdir()
    _, parts = in_parts(tmp_path, "caption", (3, 3, 4))
    list_shards(str(tmp_path / "all"), parts)
    return tmp_path / "all", parts


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_what_the_joined_dataset_holds(folder, kind):
    joined, shards = SampleStore(folder / "joined" / kind), SampleStore(folder / kind)
    tokenizer = Tokenizer(write_tokenizer(folder))
    assert len(shards.shards) == len(SIZES) and len(shards) == len(joined) == sum(SIZES)
    assert shards.fingerprint() == joined.fingerprint()
    for index in range(len(joined)):
        one, other = joined[index], shards[index]
        assert one.modes == other.modes
        assert all(np.array_equal(a, b) for a, b in zip(one.parts, other.parts, strict=True))
        assert shards.part_sizes(index) == joined.part_sizes(index)
        if kind != "text":  # keys of documents are their numbers in the file
            assert one.info == other.info
    some = np.array([19, 0, 7, 6, 19, 8, 3])
    if kind != "text":
        lengths = [store.part_lengths(some, 0).tolist() for store in (joined, shards)]
        assert lengths[0] == lengths[1]
    if kind in ("text", "caption", "interleaved"):
        tables = [store.sentences(tokenizer).take(some) for store in (joined, shards)]
        assert all(np.array_equal(a, b) for a, b in zip(*tables, strict=True))
    assert shards.manifest is not None and joined.manifest is not None
    found = dataclasses.replace(shards.manifest, shards=(), format_version=1)
    assert found == joined.manifest
    with pytest.raises(IndexError):
        shards[sum(SIZES)]


def test_the_fingerprint_of_large_shards_is_that_of_the_joined_dataset(tmp_path):
    """Files of which blocks are read, cut so that blocks lie across the edges of shards."""
    rng = np.random.default_rng(0)
    sizes = [40_000, 1, 3, 90_001]
    prefixes, everything = [], []
    for number, size in enumerate(sizes):
        parts = rng.integers(1, 4, size)
        lengths, modes = rng.integers(0, 17, parts.sum()), rng.integers(0, 3, parts.sum())
        prefix = tmp_path / f"part{number}"
        data = rng.integers(0, 256, lengths.sum(), np.uint8).tobytes()
        write_files(prefix, lengths, modes, parts, data)
        prefixes.append(str(prefix))
        everything.append((lengths, modes, parts, data))
    lengths, modes, parts = (np.concatenate([e[i] for e in everything]) for i in range(3))
    write_files(tmp_path / "joined", lengths, modes, parts, b"".join(e[3] for e in everything))
    made = list_shards(str(tmp_path / "all"), prefixes)
    joined, shards = SampleStore(tmp_path / "joined"), SampleStore(tmp_path / "all")
    assert os.path.getsize(tmp_path / "joined.idx") > 2 << 20
    assert shards.fingerprint() == joined.fingerprint()
    # Another order of the same shards is another dataset.
    other = list_shards(str(tmp_path / "turned"), prefixes[::-1])
    assert other.num_samples == made.num_samples
    assert SampleStore(tmp_path / "turned").fingerprint() != joined.fingerprint()


def write_files(prefix: Path, lengths, modes, parts, data: bytes) -> None:
    write_index(Path(f"{prefix}.idx"), np.dtype(np.uint8), lengths, modes, parts)
    Path(f"{prefix}.bin").write_bytes(data)
    Manifest("caption", "ab", 10, len(parts), 0, 0, 0).write(Path(f"{prefix}.json"))


def stream_of(folder: Path, stage: str, where: Path):
    weights = {
        "pretrain": {"text": 5, "caption": 5, "interleaved": 2},
        "align": {"caption": 1},
        "instruct": {"compositional": 2, "edit": 2, "caption": 1},
    }[stage]
    blend = {kind: (str(where / kind), weight) for kind, weight in weights.items()}
    config = run_config(folder, stage, blend)
    output = dataclasses.replace(config.logging, output_dir=str(where / f"run-{stage}"))
    config = dataclasses.replace(config, logging=output)
    make = {"pretrain": pretrain_stream, "align": align_stream, "instruct": instruct_stream}
    return make[stage](config, "train")


@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_shards_replay_the_stream_of_the_joined_dataset(folder, stage, monkeypatch):
    """Several epochs, on any data-parallel size, and after a restart in the middle."""
    monkeypatch.setattr(packing, "BLOCK", 3)  # packing indices are then files
    joined = stream_of(folder, stage, folder / "joined")
    expected = global_stream(joined, 1, GLOBAL_BATCH, 0, 0, 5)
    shards = stream_of(folder, stage, folder)
    assert shards.fingerprints() == joined.fingerprints()  # a checkpoint of one takes the other
    for dp_size, micro_batch_size, num_workers in ((1, 3, 2), (2, 3, 0), (4, 1, 0)):
        found = global_stream(shards, dp_size, micro_batch_size, num_workers, 0, 5, True)
        assert found == expected
    restarted = global_stream(stream_of(folder, stage, folder), 3, 2, 0, 3, 2, True)
    assert restarted == expected[3 * GLOBAL_BATCH :]
    names = [sorted(p.name for p in w.rglob("epoch*-*")) for w in (folder / "joined", folder)]
    if stage == "pretrain":  # the index of one serves the other
        folders = [p.name for p in (folder / "run-pretrain").rglob("epoch*-*") if p.is_dir()]
        assert folders and set(folders) <= set(names[0])


def test_opening_costs_neither_descriptors_nor_memory_of_samples(tmp_path):
    """Sparse indices; the lengths of one shard, summed up as int64, would take 160 MB."""
    num_samples, lists = 20_000_000, []
    for number in range(4):
        prefix = tmp_path / f"s{number}"
        with Path(f"{prefix}.idx").open("wb") as index:
            header = index_header(np.dtype(np.uint8), num_samples, num_samples)
            index.write(header)
            index.truncate(len(header) + 21 * num_samples + 8)
            index.seek(len(header) + 20 * num_samples)
            index.write(num_samples.to_bytes(8, "little"))  # of sequences before the end
        Path(f"{prefix}.bin").touch()
        lists.append(
            {
                "path": prefix.name,
                "first_sample": number * num_samples,
                "num_samples": num_samples,
                "num_sequences": num_samples,
                "num_bytes": 0,
                "fingerprint": f"{number}",
            }
        )
    fields = vars(Manifest("caption", "ab", 10, 4 * num_samples, 0, 0, 0))
    manifest = fields | {"format_version": 2, "shards": lists}
    (tmp_path / "all.json").write_text(json.dumps(manifest))
    before = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    store = SampleStore(tmp_path / "all")
    for number in range(4):
        assert store.shards[number].sequences.num_documents == num_samples
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(store) == 4 * num_samples
    assert len(os.listdir("/proc/self/fd")) == before
    assert peak < 40 << 20  # the largest manifest that is read


def test_files_that_are_missing_or_cut_are_named(captions):
    prefix, parts = captions
    Path(f"{parts[1]}.bin").rename(f"{parts[1]}.away")
    Path(f"{parts[2]}.idx").rename(f"{parts[2]}.away2")
    with pytest.raises(FileNotFoundError) as raised:
        SampleStore(prefix)
    assert f"{parts[1]}.bin, {parts[2]}.idx missing" in str(raised.value)
    assert missing_files(prefix) == [f"{parts[1]}.bin", f"{parts[2]}.idx"]
    Path(f"{parts[1]}.away").rename(f"{parts[1]}.bin")
    Path(f"{parts[2]}.away2").rename(f"{parts[2]}.idx")
    for end in (".bin", ".idx"):
        whole = Path(f"{parts[2]}{end}").read_bytes()
        Path(f"{parts[2]}{end}").write_bytes(whole[:-1])
        with pytest.raises(InputError, match="a shard is cut") as cut:
            SampleStore(prefix)
        assert f"{parts[2]}{end} has {len(whole) - 1} bytes, not {len(whole)}" in str(cut.value)
        Path(f"{parts[2]}{end}").write_bytes(whole)
    SampleStore(prefix)


def test_a_list_out_of_order_doubled_or_short_is_refused_by_name(captions):
    prefix, _ = captions
    path = Path(f"{prefix}.json")
    manifest = json.loads(path.read_text())
    one, two, three = manifest["shards"]
    assert is_manifest(path)
    wrong = {
        "disk1/caption-1 stands at place 0 and begins at sample 3": [two, one, three],
        "disk0/caption-2 stands at place 1 and begins at sample 6": [one, three],
        "its shards hold 6 samples, num_samples is 10": [one, two],
        "shard disk1/caption-1 is listed twice": [one, two, two],
        "shards is no list of objects": [one, 2],
        "num_bytes is no count": [one, two | {"num_bytes": -1}, three],
        "unexpected keyword": [one, two | {"more": 1}, three],
    }
    for words, shards in wrong.items():
        path.write_text(json.dumps(manifest | {"shards": shards}))
        with pytest.raises(InputError, match="not a readable manifest") as raised:
            SampleStore(prefix)
        assert words in str(raised.value)


def swap(one: str, other: str) -> None:
    for end in (".bin", ".idx", ".json", ".sentences.npy", ".sentence_offsets.npy"):
        first, second = Path(f"{one}{end}"), Path(f"{other}{end}")
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)


def test_shards_that_took_each_others_names_are_noticed(tmp_path, capsys):
    for name in ("joined", "disk0", "disk1"):
        (tmp_path / name).mkdir()
    _, parts = in_parts(tmp_path, "caption", (3, 4))
    list_shards(str(tmp_path / "all"), parts)
    swap(*parts)
    with pytest.raises(InputError, match="another has its name"):
        SampleStore(tmp_path / "all")
    swap(*parts)
    # Of one size, only the content tells: a byte changed in place.
    data = Path(f"{parts[1]}.bin")
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    store = SampleStore(tmp_path / "all")
    assert [found.problem is None for found in check_shards(str(tmp_path / "all"))] == [True, False]
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    reasons = [found.reason for found in check_dataset(store, tokenizer, 1, lambda *_: None)]
    assert f"shard {parts[1]} has another content than the manifest notes" in reasons
    assert command.main([str(tmp_path / "all")]) == 1
    output = capsys.readouterr().out
    assert "disk0/caption-0: samples 0 to 2" in output and "2 shards, 1 bad" in output
    assert f"{parts[1]} has another content" in output


def test_a_shard_moves_and_is_added_but_never_changes_place(captions, capsys):
    prefix, parts = captions
    moved = prefix.parent / "far" / "away"
    moved.parent.mkdir()
    for file in filter(Path.exists, files_of_all_shards(parts[1])):
        file.rename(f"{moved}{str(file).removeprefix(parts[1])}")
    before = [SampleStore(part)[0].info for part in (parts[0], str(moved), parts[2])]
    assert command.main([str(prefix), parts[0], str(moved), parts[2]]) == 0
    assert "caption, 3 shards, 10 samples" in capsys.readouterr().out.replace(": ", ", ")
    store = SampleStore(prefix)
    assert [store[i].info for i in (0, 3, 6)] == before
    for wrong in ([parts[0], parts[2], str(moved)], [parts[0], str(moved)]):
        assert command.main([str(prefix), *wrong]) == 2
        assert "samples would change their numbers" in capsys.readouterr().err
    records = image_records(prefix.parent / "more", "caption", 2, seed=5)
    input_file = write_jsonl(prefix.parent / "more" / "r.jsonl", records)
    more = written(prefix.parent, "caption", prefix.parent / "extra", [input_file])
    assert command.main([str(prefix), parts[0], str(moved), parts[2], more]) == 0
    longer = SampleStore(prefix)
    assert len(longer) == 12 and longer[11].info == SampleStore(more)[1].info
    copy = prefix.parent / "copy"
    for file in filter(Path.exists, files_of_all_shards(parts[0])):
        shutil.copy(file, f"{copy}{str(file).removeprefix(parts[0])}")
    for wrong, words in (
        ([parts[0], parts[0]], "is listed twice"),
        ([parts[0], str(copy)], "shard copy has the content of shard disk0/caption-0"),
        ([str(prefix)], "a list of shards itself"),
        ([parts[0], written_text(prefix.parent)], "are no shards of one dataset: kind"),
    ):
        assert command.main([str(prefix.parent / "new"), *wrong]) == 2
        assert words in capsys.readouterr().err
    assert command.main([parts[0], more]) == 2
    assert "is a dataset in one piece" in capsys.readouterr().err


def written_text(folder: Path) -> str:
    input_file = write_jsonl(folder / "texts.jsonl", text_records(3))
    return written(folder, "text", folder / "texts", [input_file])


def test_places_of_the_shards_are_relative_to_their_list(captions, monkeypatch):
    prefix, parts = captions
    paths = [entry.path for entry in Manifest.read(Path(f"{prefix}.json")).shards]
    assert paths == ["disk0/caption-0", "disk1/caption-1", "disk0/caption-2"]
    other = prefix.parent / "joined" / "all"
    list_shards(str(other), parts)
    assert [entry.path for entry in Manifest.read(Path(f"{other}.json")).shards] == parts
    prefix.parent.rename(prefix.parent.with_name("renamed"))
    monkeypatch.chdir(prefix.parent.with_name("renamed"))
    assert len(SampleStore("all")) == len(SampleStore(Path("all").absolute())) == 10
    assert len(list(itertools.islice(check_shards("all"), 3))) == 3
