"""Inputs that are damaged, or cannot be meant: what comes before the damage, or a refusal."""

from __future__ import annotations

import gzip
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.preprocess.mpi_workers import choose_workers
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, TooManyRejects, preprocess
from tests.support.data_helpers import noise_image, write_jsonl, write_tar, write_tokenizer
from tests.support.dataset_files import info_of, read_samples


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    ("damage", "reason", "kept"),
    [
        (lambda data, at: data[: at["3.png"] + 600], "tar is truncated", 3),
        (lambda data, at: data[: at["3.txt"] + 600], "tar is truncated", 4),
        (lambda data, at: data[: at["3.txt"] + 1024], "tar is truncated", 4),
        (lambda data, at: data[: at["3.txt"] + 300], "tar is truncated", 3),
        (lambda data, at: b"", "tar is an empty file", 0),
        (lambda data, at: b"\x07" * 5000, "tar is damaged", 0),
        (lambda data, at: data[: at["1.png"]] + b"\x07" * 9000, "tar is damaged", 1),
    ],
)
def test_damaged_tars_give_what_stands_before_the_damage(tmp_path, model, damage, reason, kept):
    members = [m for i in range(4) for m in ((f"{i}.png", noise_image(i)), (f"{i}.txt", b"red"))]
    write_tar(tmp_path / "b.tar", [("x.png", noise_image(9)), ("x.txt", b"snow")])
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path) as archive:
        offsets = {member.name: member.offset for member in archive}
    path.write_bytes(damage(path.read_bytes(), offsets))
    job = PreprocessJob(
        "caption", (str(tmp_path / "*.tar"),), str(model), str(tmp_path / "o"), workers=2
    )
    preprocess(job, lambda *_: None)
    rejects = [json.loads(line) for line in Path(tmp_path / "o.rejects.jsonl").open()]
    reasons = [r["reason"] for r in rejects]
    assert reason in reasons and set(reasons) <= {reason, "no field caption"}
    keys = [info_of(sample)["key"] for sample in read_samples(tmp_path / "o")]
    assert keys == [*map(str, range(kept)), "x"]


def test_damaged_files_are_met_with_a_limit_too(tmp_path, model):
    packed = gzip.compress(b'{"text": "red dog"}\n' * 50 + b'{"text": "a house"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-12])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "c.jsonl").write_text('{"text": "snow"}\n' * 3)
    every = ["gzip file is damaged", "not a Parquet file"]
    # Nobody can count a damaged file: it may use up the limit.
    for limit, expected in ((None, every), (70, every[:1])):
        job = PreprocessJob(
            "text",
            (str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.parquet"), str(tmp_path / "c.jsonl")),
            str(model),
            str(tmp_path / "o"),
            limit=limit,
        )
        preprocess(job, lambda *_: None)
        lines = (tmp_path / "o.rejects.jsonl").read_text().splitlines()
        reasons = [json.loads(line)["reason"] for line in lines]
        assert reasons == expected
        assert 2 < len(read_samples(tmp_path / "o", has_modes=False)) <= 54


def test_a_column_name_that_is_not_unicode_is_damage_to_the_file(tmp_path, model):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra `data`")
    path = tmp_path / "a.parquet"
    table = pytest.importorskip("pyarrow").table({"comment": ["red dog"]})
    parquet.write_table(table, path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"comment", b"co\x80ment"))
    write_jsonl(tmp_path / "b.jsonl", [{"text": "snow"}] * 3)
    paths = (str(path), str(tmp_path / "b.jsonl"))
    job = PreprocessJob("text", paths, str(model), str(tmp_path / "o"))
    preprocess(job, lambda *_: None)
    (line,) = (tmp_path / "o.rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "not a Parquet file"
    assert len(read_samples(tmp_path / "o", has_modes=False)) > 0


def test_too_many_rejects_end_the_run_early(tmp_path, model, monkeypatch):
    monkeypatch.setattr("megatron_kosmosg.preprocess.input_files.MAX_RECORDS", 2)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 100)
    seen = []
    job = PreprocessJob("text", (str(path),), str(model), str(tmp_path / "o"), max_rejects=5)
    with pytest.raises(TooManyRejects, match="6 records rejected, --max-rejects allows 5"):
        preprocess(job, lambda done, total, counts: seen.append(done))
    assert seen == [0, 1, 2, 3]
    assert len((tmp_path / "o.rejects.jsonl").read_text().splitlines()) == 6
    assert not list(tmp_path.glob("o.[bij]*"))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (Options(max_images=2), "caption", "--max-images is for --kind interleaved"),
        (Options(max_image_pixels=0), "caption", "--max-image-pixels 0 must lie in"),
        (Options(min_images=3, max_images=2), "interleaved", "--max-images 2 must be at least"),
        (Options(min_image_side=0), "caption", "--min-image-side 0 must be at least 1"),
        (Options(image_root="nowhere"), "caption", "--image-root nowhere is not a folder"),
        (Options(fields=(("capton", "title"),)), "caption", "has no field capton; it has key, cap"),
    ],
)
def test_impossible_options_are_refused(options, kind, message):
    with pytest.raises(ValueError, match=message):
        options.check(KINDS[kind])


def test_inputs_that_cannot_be_meant_are_refused(tmp_path, model):
    prefix = str(tmp_path / "o")
    (tmp_path / "a.xyz").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "newest").mkdir()
    (tmp_path / "newest" / "a.txt").symlink_to(tmp_path / "a.txt")
    for kind, names, message in (
        ("text", ["a.xyz"], "does not tell the format"),
        ("caption", ["a.txt"], "--kind caption is not read from txt"),
        ("text", ["a.txt", "*.txt"], "twice"),
        ("text", ["**/*.txt"], r"newest/a.txt twice; \S+/a.txt is the same"),
        ("text", ["*.nothing"], "matches no file"),
    ):
        job = PreprocessJob(
            kind, tuple(str(tmp_path / n) for n in names), str(model), str(tmp_path / "o")
        )
        with pytest.raises(ValueError, match=message):
            preprocess(job, lambda *_: None)
    (tmp_path / "a.json").write_text('["red"]')
    (tmp_path / "b.json").write_text('[{"text":')
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    good, spm = str(tmp_path / "a.txt"), str(model)
    for job, message in (
        (PreprocessJob("text", (str(tmp_path / "a.json"),), spm, ""), "one JSON object a line"),
        (PreprocessJob("text", (str(tmp_path / "b.json"),), spm, ""), "b.json begins like a JSON"),
        (PreprocessJob("caption", (str(tmp_path / "a.tar.gz"),), spm, ""), "unpack it first"),
        (PreprocessJob("text", (good,), spm, f"{tmp_path}/o/"), "must end with a name"),
        (PreprocessJob("text", (good,), spm, "", limit=0), "--limit 0 must be at least 1"),
        (PreprocessJob("text", (good,), spm, "", max_rejects=-1), "must not be negative"),
        (PreprocessJob("text", (good,), good, ""), "a.txt is not a SentencePiece model"),
    ):
        with pytest.raises(ValueError, match=message):
            preprocess(replace(job, output_prefix=job.output_prefix or prefix), lambda *_: None)
    with pytest.raises(ValueError, match="--workers 0 must be at least 1"):
        choose_workers(0, {})
    assert not list(tmp_path.glob("o*"))
