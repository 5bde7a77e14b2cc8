"""tools/preprocess_data.py as its users run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kosmosg.data.kinds import TEXT
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.preprocess import input_files, text_batches
from megatron_kosmosg.preprocess.input_files import find_inputs
from megatron_kosmosg.preprocess.jsonl import JsonlReader
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from megatron_kosmosg.preprocess.record_readers import ShardSize
from tests.support.data_helpers import image_records, text_records, write_jsonl, write_tokenizer

REPOSITORY = Path(__file__).parents[2]
OUTPUTS = (".bin", ".idx", ".json", ".sentences.npy", ".sentence_offsets.npy", ".rejects.jsonl")
KINDS = ("text", "caption", "interleaved", "edit", "compositional")


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )


def quiet(job: PreprocessJob) -> None:
    preprocess(job, lambda *_: None)


def test_tool_writes_a_dataset_and_a_summary(tmp_path):
    model = write_tokenizer(tmp_path)
    records = image_records(tmp_path, "caption", 6)
    records[2]["image"] = "images/none.png"
    source = write_jsonl(tmp_path / "captions.jsonl", records)
    prefix = tmp_path / "out" / "captions"
    done = run_tool(
        *("--kind", "caption", "--input", str(source), "--tokenizer-model", str(model)),
        *("--output-prefix", str(prefix), "--workers", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert "image cannot be read" in done.stdout and "100%" in done.stderr
    assert re.search(r"\n5 images checked in .* CPU time .* --verify-images decode\n", done.stdout)
    assert len(SampleStore(prefix)) == 5
    (reject,) = map(json.loads, Path(f"{prefix}.rejects.jsonl").read_text().splitlines())
    assert (reject["source"], reject["key"]) == ("captions.jsonl:3", "caption-2")
    assert sorted(p.name for p in prefix.parent.iterdir()) == sorted(
        prefix.name + end for end in OUTPUTS
    )


def test_tool_ends_with_an_error_and_no_dataset_when_too_many_are_rejected(tmp_path):
    model = write_tokenizer(tmp_path)
    source = write_jsonl(tmp_path / "t.jsonl", [*text_records(3), {"text": " "}, {"words": "a"}])
    prefix = tmp_path / "t"
    done = run_tool(
        *("--kind", "text", "--input", str(source), "--tokenizer-model", str(model)),
        *("--output-prefix", str(prefix), "--max-rejects", "1"),
    )
    assert done.returncode == 3
    assert "2 records rejected, --max-rejects allows 1" in done.stderr
    assert "empty text" in done.stderr and "Traceback" not in done.stderr
    assert not Path(f"{prefix}.bin").exists() and not Path(f"{prefix}.json").exists()
    assert len(Path(f"{prefix}.rejects.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_byte_identical_for_any_number_of_workers(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(input_files, "MAX_RECORDS", 4)
    model = write_tokenizer(tmp_path)
    records = text_records(30) if kind == "text" else image_records(tmp_path, kind, 30)
    broken = {"key": "broken", "text": 5}
    files = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", part))
        for name, part in (("a", [*records[:17], broken]), ("b", records[17:]))
    ]
    contents = []
    for workers in (1, 2, 5):
        prefix = tmp_path / f"workers{workers}"
        quiet(PreprocessJob(kind, tuple(files), str(model), str(prefix), workers))
        contents.append([Path(f"{prefix}{end}").read_bytes() for end in OUTPUTS])
    assert contents[0] == contents[1] == contents[2]
    assert len(SampleStore(tmp_path / "workers5")) == 30


def test_shards_cover_the_file_and_the_limit_is_global(tmp_path, monkeypatch):
    monkeypatch.setattr(input_files, "MAX_RECORDS", 4)
    model = write_tokenizer(tmp_path)
    files = [str(write_jsonl(tmp_path / f"{i}.jsonl", text_records(10, seed=i))) for i in range(2)]
    shards = JsonlReader().shards(Path(files[0]), None, ShardSize(4, 1 << 20, 1 << 20))
    assert [shard.num_records for shard in shards] == [4, 4, 2]
    prefix = tmp_path / "limited"
    quiet(PreprocessJob("text", tuple(files), str(model), str(prefix), limit=13))
    whole = tmp_path / "whole"
    quiet(PreprocessJob("text", tuple(files), str(model), str(whole)))
    limited_store, whole_store = SampleStore(prefix), SampleStore(whole)
    assert (len(limited_store), len(whole_store)) == (13, 20)
    for i in range(13):
        assert limited_store.text(i).tolist() == whole_store.text(i).tolist()


BAD_LINES = {
    b'{"key": "x", "image": "good.png"}': "no field caption",
    b'{"key": "x", "image": "good.png", "caption": "  "}': "empty caption",
    b'{"key": "x", "image": "good.png", "caption": 3}': "caption is not text",
    b'{"key": "x", "caption": "red"}': "no field image",
    b'{"key": "x", "image": 3, "caption": "red"}': "image is not a file name",
    b'{"key": "x", "image": "gone.png", "caption": "red"}': "image cannot be read",
    b'{"key": "x", "image": "empty.png", "caption": "red"}': "image is an empty file",
    b'{"key": "x", "image": "half.png", "caption": "red"}': "image is truncated",
    b'{"key": "x", "image": "page.png", "caption": "red"}': "image is a web page",
    b"{not json": "not JSON",
    b"[1, 2]": "not a JSON object",
    b'{"key": "\xff\xfe"}': "invalid UTF-8",
}


def test_every_bad_record_is_named_with_its_reason(tmp_path):
    model = write_tokenizer(tmp_path)
    (good,) = image_records(tmp_path, "caption", 1)
    image = (tmp_path / good["image"]).read_bytes()
    for name, data in (
        ("good.png", image),
        ("empty.png", b""),
        ("half.png", image[: len(image) // 2]),
        ("page.png", b"<html></html>"),
    ):
        (tmp_path / name).write_bytes(data)
    lines = [*BAD_LINES, b"", json.dumps(good).encode()]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    prefix = tmp_path / "out"
    quiet(PreprocessJob("caption", (str(tmp_path / "bad.jsonl"),), str(model), str(prefix)))
    rejects = [json.loads(line) for line in Path(f"{prefix}.rejects.jsonl").open()]
    assert [reject["reason"] for reject in rejects] == list(BAD_LINES.values())
    assert [reject["source"] for reject in rejects] == [
        f"bad.jsonl:{i + 1}" for i in range(len(BAD_LINES))
    ]
    assert len(SampleStore(prefix)) == 1


def test_no_input_is_an_error_never_an_empty_dataset(tmp_path):
    model = str(write_tokenizer(tmp_path))
    with pytest.raises(ValueError, match="matches no file"):
        quiet(PreprocessJob("text", (str(tmp_path / "*.jsonl"),), model, str(tmp_path / "o")))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no records"):
        quiet(PreprocessJob("text", (str(tmp_path / "empty.jsonl"),), model, str(tmp_path / "o")))
    write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match="no usable record"):
        quiet(PreprocessJob("text", (str(tmp_path / "empty.jsonl"),), model, str(tmp_path / "o")))
    assert not list(tmp_path.glob("o.*bin")) and not list(tmp_path.glob("o.json"))


def test_a_failed_run_leaves_the_older_dataset_whole(tmp_path):
    model = str(write_tokenizer(tmp_path))
    good = str(write_jsonl(tmp_path / "good.jsonl", text_records(4)))
    bad = str(write_jsonl(tmp_path / "bad.jsonl", [*text_records(2), {}]))
    prefix = str(tmp_path / "o")
    quiet(PreprocessJob("text", (good,), model, prefix))
    before = Path(f"{prefix}.bin").read_bytes()
    with pytest.raises(ValueError, match="rejected"):
        quiet(PreprocessJob("text", (bad,), model, prefix, max_rejects=0))
    assert Path(f"{prefix}.bin").read_bytes() == before and len(SampleStore(prefix)) == 4
    quiet(PreprocessJob("text", (bad,), model, prefix, max_rejects=1, resume=True))
    assert len(SampleStore(prefix)) == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_globs_are_sorted_and_names_are_taken_literally(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "[x].jsonl"):
        (tmp_path / name).write_text("{}")
    found = find_inputs([str(tmp_path / "?.jsonl"), str(tmp_path / "[x].jsonl")], TEXT)
    assert [source.path.name for source in found] == ["a.jsonl", "b.jsonl", "[x].jsonl"]


def test_a_worker_that_dies_is_an_error_not_a_hang(tmp_path, monkeypatch):
    model = str(write_tokenizer(tmp_path))
    monkeypatch.setattr(input_files, "MAX_RECORDS", 1)
    source = str(write_jsonl(tmp_path / "t.jsonl", text_records(3)))
    monkeypatch.setattr(text_batches.TextBatches, "add", lambda *_: os._exit(9))
    with pytest.raises(ValueError, match="worker process ended unexpectedly"):
        quiet(PreprocessJob("text", (source,), model, str(tmp_path / "o"), workers=2))
    assert not list(tmp_path.glob("o.*"))
