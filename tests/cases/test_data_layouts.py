"""Tars and tables of public datasets whose fields are named or filled otherwise."""

from __future__ import annotations

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.support.commands import REPOSITORY
from tests.support.data_helpers import encode_image, write_parquet, write_tar
from tests.support.data_inputs import preprocess
from tests.support.marks import not_mended_yet
from tests.support.peak_memory import peak_memory

RED, GREEN = (
    encode_image(np.full((8, 8, 3), colour, np.uint8), "JPEG")
    for colour in ((255, 0, 0), (0, 255, 0))
)


def fields(**values) -> bytes:
    """A member KEY.json."""
    return json.dumps(values).encode()


TARS: dict[str, list[tuple[str, bytes]]] = {
    "folders with dots": [
        ("./train.v1/0001.jpg", RED),
        ("./train.v1/0001.txt", b"a red house"),
        ("./train.v1/._0001.jpg", b"a Mac's note"),
        ("./train.v1/.DS_Store", b"another"),
        ("./train.v1/0002.JPG", GREEN),
        ("./train.v1/0002.txt", b"a green house"),
    ],
    "long names": [
        ("n" * 180 + ".jpg", RED),
        ("n" * 180 + ".txt", b"a red house"),
        ("ü" * 90 + "/ключ 1=a,b.jpg", GREEN),
        ("ü" * 90 + "/ключ 1=a,b.txt", b"a green house"),
    ],
    "caption null": [
        ("0.jpg", RED),
        ("0.txt", b"a red house"),
        ("0.json", fields(caption=None, key="0", status="success", url="u")),
        ("1.jpg", GREEN),
        ("1.txt", b"a green house"),
    ],
    "caption empty": [
        ("0.jpg", RED),
        ("0.txt", b"a red house"),
        ("0.json", fields(caption="", key="0")),
        ("1.jpg", GREEN),
        ("1.txt", b"a green house"),
    ],
    "image is an address": [
        ("0.jpg", RED),
        ("0.json", fields(image="https://x/y.jpg", caption="a red house")),
        ("1.jpg", GREEN),
        ("1.json", fields(image="images/1.jpg", caption="a green house")),
    ],
}
"""{name: members of two samples, red and green}."""

FAULTS = {
    "caption null": "the JSON's null wins over the .txt beside it",
    "caption empty": "the JSON's empty text wins over the .txt beside it",
    "image is an address": "the JSON's address wins over the image beside it",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=not_mended_yet(FAULTS[name]) if name in FAULTS else ())
        for name in TARS
    ],
)
def test_a_tar_gives_its_two_samples(tmp_path, commands, model, name):
    path = write_tar(tmp_path / "a.tar", TARS[name])
    done = preprocess(commands, "caption", model, tmp_path / "out", path)
    assert found(done) == [("a red house", RED), ("a green house", GREEN)]
    assert done.rejects == []


@not_mended_yet("--field names fields of the JSON, and nothing names members")
def test_field_names_members_of_a_tar(tmp_path, commands, model):
    members = [
        ("s0.input.jpg", RED),
        ("s0.outputs.txt", b"a red house"),
        ("s1.input.jpg", GREEN),
        ("s1.outputs.txt", b"a green house"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    named = ("--field", "image=input.jpg", "--field", "caption=outputs.txt")
    done = preprocess(commands, "caption", model, tmp_path / "out", path, *named)
    assert found(done) == [("a red house", RED), ("a green house", GREEN)]


@not_mended_yet("reading stops at the end mark of the first archive, without a word")
def test_an_archive_after_the_first_is_read_or_named(tmp_path, commands, model):
    parts = [
        write_tar(tmp_path / f"{key}.tar", [(f"{key}.jpg", data), (f"{key}.txt", words)])
        for key, data, words in (("a", RED, b"a red house"), ("b", GREEN, b"a green house"))
    ]
    path = tmp_path / "joined.tar"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    done = preprocess(commands, "caption", model, tmp_path / "out", path)
    assert done.rejects or found(done) == [("a red house", RED), ("a green house", GREEN)]


def found(done) -> list[tuple[str, bytes]]:
    """(caption, image) of the samples."""
    return [(sample.info["caption"], sample.images[0]) for sample in done.samples.values()]


def edits(**more) -> dict:
    """A row of InstructPix2Pix' Hugging Face form, without a caption unless given."""
    images = {"input_image": RED, "edited_image": GREEN}
    row = {name: {"bytes": data, "path": None} for name, data in images.items()}
    return row | {"edit_prompt": "make it green"} | more


def edit_options(**names: str) -> list[str]:
    return [part for ours, theirs in names.items() for part in ("--field", f"{ours}={theirs}")]


@not_mended_yet("an edit without the caption of its source is rejected, and no option helps")
def test_edits_without_a_caption_are_usable(tmp_path, commands, model):
    path = write_parquet(tmp_path / "edits.parquet", [edits()])
    options = edit_options(image="input_image")
    done = preprocess(commands, "edit", model, tmp_path / "out", path, *options)
    (sample,) = done.samples.values() or [None]
    assert sample is not None
    assert sample.info["instruction"] == "make it green" and sample.images == [RED, GREEN]


@not_mended_yet("the second --field finds nothing where the first has taken the column")
def test_one_column_serves_two_fields(tmp_path, commands, model):
    path = write_parquet(tmp_path / "edits.parquet", [edits()])
    options = edit_options(image="input_image", caption="edit_prompt", instruction="edit_prompt")
    done = preprocess(commands, "edit", model, tmp_path / "out", path, *options)
    assert [sample.info["caption"] for sample in done.samples.values()] == ["make it green"]
    assert [sample.info["instruction"] for sample in done.samples.values()] == ["make it green"]


@not_mended_yet("a row group is read as a whole, however large it is")
def test_a_table_takes_the_memory_of_a_batch_and_not_of_its_row_group(tmp_path, model):
    pixels = np.random.default_rng(0).integers(0, 256, (170, 200, 3), dtype=np.uint8)
    data = encode_image(pixels)
    rows = [{"key": str(i), "image": data, "caption": "a house"} for i in range(250)]
    table = pyarrow.Table.from_pylist(rows)
    peaks = []
    for group in (50, len(rows)):
        path = tmp_path / f"{group}.parquet"
        plain = {"use_dictionary": False, "compression": "none"}  # the image only repeats here
        parquet.write_table(table, path, row_group_size=group, **plain)
        peak, _ = peak_memory(
            REPOSITORY / "tools" / "preprocess_data.py",
            *("--kind", "caption", "--input", path, "--tokenizer-model", model),
            *("--output-prefix", tmp_path / "out", "--verify-images", "header"),
        )
        peaks.append(peak)
    megabytes = len(rows) * len(data) / 1e6
    assert peaks[1] - peaks[0] < megabytes / 3, (peaks, megabytes)
