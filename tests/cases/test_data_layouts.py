"""Tars and tables of public datasets whose fields are named or filled otherwise."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.support.commands import REPOSITORY
from tests.support.data_helpers import encode_image, write_parquet, write_tar
from tests.support.data_inputs import preprocess
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


def test_a_image_is_told_by_its_content(tmp_path, commands, model):
    names = [("0.jfif", RED), ("0.txt", b"a red house"), ("1.HEIC", GREEN), ("1.txt", b"a house")]
    names += [("2.avif", b"none"), ("2.txt", b"a dog")]
    path = write_tar(tmp_path / "a.tar", names)
    done = preprocess(commands, "caption", model, tmp_path / "out", path)
    assert found(done) == [("a red house", RED), ("a house", GREEN)]
    assert [reject["reason"] for reject in done.rejects] == ["image is not a known image format"]


@pytest.mark.parametrize("name", TARS)
def test_a_tar_gives_its_two_samples(tmp_path, commands, model, name):
    path = write_tar(tmp_path / "a.tar", TARS[name])
    done = preprocess(commands, "caption", model, tmp_path / "out", path)
    assert found(done) == [("a red house", RED), ("a green house", GREEN)]
    assert done.rejects == []


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


def test_an_archive_after_the_first_is_read_or_named(tmp_path, commands, model):
    parts = [
        write_tar(tmp_path / f"{key}.tar", [(f"{key}.jpg", data), (f"{key}.txt", words)])
        for key, data, words in (("a", RED, b"a red house"), ("b", GREEN, b"a green house"))
    ]
    path = tmp_path / "joined.tar"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    done = preprocess(commands, "caption", model, tmp_path / "out", path)
    assert found(done) == [("a red house", RED), ("a green house", GREEN)]


def test_what_is_no_archive_after_the_first_is_named(tmp_path, commands, model):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", RED), ("a.txt", b"a red house")])
    path.write_bytes(path.read_bytes() + b"not an archive" * 100)
    done = preprocess(commands, "caption", model, tmp_path / "out", path)
    assert found(done) == [("a red house", RED)]
    assert [reject["reason"] for reject in done.rejects] == ["tar is damaged"]


def test_a_missing_field_of_a_tar_is_answered_with_the_members_that_it_has(
    tmp_path, commands, model
):
    members = [("a.x.jpg", RED), ("a.txt", b"a red house"), ("b.jpg", RED), ("b.txt", b"a house")]
    path = write_tar(tmp_path / "a.tar", members)
    done = preprocess(commands, "caption", model, tmp_path / "out", path)
    (reject,) = done.rejects
    assert reject["reason"] == "no field image"
    assert reject["detail"] == "it has x.jpg, txt; --field image=MEMBER names one"


def found(done) -> list[tuple[str, bytes]]:
    """(caption, image) of the samples."""
    return [(sample.info["caption"], sample.images[0]) for sample in done.samples.values()]


def edits(**more) -> dict:
    """A row of InstructPix2Pix' Hugging Face form, without a caption unless given."""
    images = {"input_image": RED, "edited_image": GREEN}
    row = {name: {"bytes": data, "path": None} for name, data in images.items()}
    return row | {"edit_prompt": "make it green"} | more


def edit_options(**names: str) -> list[str]:
    return [part for field, name in names.items() for part in ("--field", f"{field}={name}")]


def test_edits_without_a_caption_are_usable(tmp_path, commands, model):
    path = write_parquet(tmp_path / "edits.parquet", [edits()])
    options = edit_options(image="input_image")
    done = preprocess(commands, "edit", model, tmp_path / "out", path, *options)
    (sample,) = done.samples.values() or [None]
    assert sample is not None
    assert sample.info["instruction"] == "make it green" and sample.images == [RED, GREEN]
    assert re.search(r"(?m)^captions left out +1$", done.ran.out)


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_a_field_that_says_nothing_leaves_its_place_to_the_next(tmp_path, commands, model, empty):
    rows = [{"caption": empty, "text": "a red house", "image": RED}]
    rows += [{"caption": "a green house", "text": "more", "image": GREEN}]
    path = write_parquet(tmp_path / "captions.parquet", rows)
    done = preprocess(commands, "caption", model, tmp_path / "out", path)
    assert found(done) == [("a red house", RED), ("a green house", GREEN)]


def test_two_columns_change_places(tmp_path, commands, model):
    path = write_parquet(tmp_path / "edits.parquet", [edits(image=GREEN, target=RED)])
    options = edit_options(image="target", target="image")
    done = preprocess(commands, "edit", model, tmp_path / "out", path, *options)
    assert [sample.images for sample in done.samples.values()] == [[RED, GREEN]]


def test_one_column_serves_two_fields(tmp_path, commands, model):
    path = write_parquet(tmp_path / "edits.parquet", [edits()])
    options = edit_options(image="input_image", caption="edit_prompt", instruction="edit_prompt")
    done = preprocess(commands, "edit", model, tmp_path / "out", path, *options)
    assert [sample.info["caption"] for sample in done.samples.values()] == ["make it green"]
    assert [sample.info["instruction"] for sample in done.samples.values()] == ["make it green"]


def test_a_table_takes_the_memory_of_a_batch_and_not_of_its_row_group(tmp_path, model):
    pixels = np.random.default_rng(0).integers(0, 256, (170, 200, 3), dtype=np.uint8)
    data = encode_image(pixels)
    rows = [{"key": str(i), "image": data, "caption": "a house"} for i in range(750)]
    table = pyarrow.Table.from_pylist(rows)
    peaks = []
    for group in (150, len(rows)):
        path = tmp_path / f"{group}.parquet"
        # The image only repeats here. What is read at once is a page, whose rows are counted.
        plain = {"use_dictionary": False, "compression": "none", "write_batch_size": 16}
        parquet.write_table(table, path, row_group_size=group, **plain)
        peak, _ = peak_memory(
            REPOSITORY / "tools" / "preprocess_data.py",
            *("--kind", "caption", "--input", path, "--tokenizer-model", model),
            *("--output-prefix", tmp_path / "out", "--verify-images", "header"),
        )
        peaks.append(peak)
    megabytes = len(rows) * len(data) / 1e6
    assert peaks[1] - peaks[0] < megabytes / 3, (peaks, megabytes)
