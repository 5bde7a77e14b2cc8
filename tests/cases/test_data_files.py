"""Files as users have them: every form is read, or refused in words that name it."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.data_helpers import encode_image, write_jsonl
from tests.support.data_inputs import preprocess
from tests.support.marks import not_mended_yet

TEXTS = [{"text": "a red house ."}, {"text": "a small dog ."}]
LINES = "".join(json.dumps(record) + "\n" for record in TEXTS).encode()


def image(level: int) -> bytes:
    """Another PNG for every level."""
    return encode_image(np.full((8, 8, 3), level, np.uint8))


def jpeg(level: int) -> bytes:
    """The same as JPEG."""
    return encode_image(np.full((8, 8, 3), level, np.uint8), "JPEG")


def test_an_output_never_takes_the_place_of_an_input(tmp_path, commands, model):
    corpus = tmp_path / "my-corpus.json"
    corpus.write_bytes(LINES)
    done = preprocess(commands, "text", model, tmp_path / "my-corpus", corpus)
    assert done.ran.code == 2 and "my-corpus.json" in done.ran.err
    assert corpus.read_bytes() == LINES


def test_a_repeated_command_does_not_read_its_own_rejects(tmp_path, commands, model):
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS, {"text": ""}])
    found = []
    for _ in range(3):
        # As in a shell that was given a quoted pattern, in the folder of the files.
        done = preprocess(commands, "text", model, Path("all"), "*.jsonl", cwd=tmp_path)
        rejects = (tmp_path / "all.rejects.jsonl").read_text().splitlines()
        found.append((done.ran.code, len(rejects)))
    assert found == [(0, 1)] * 3


def upper_case_gzip(path: Path) -> Path:
    path = path.with_name("A.JSONL.GZ")
    path.write_bytes(gzip.compress(LINES))
    return path


def standard_zip(path: Path) -> Path:
    """Zstandard: a frame of one raw block, in the format's own bytes."""
    path = path.with_name("a.jsonl.zst")
    block = (len(LINES) << 3 | 1).to_bytes(3, "little")
    size = len(LINES).to_bytes(4, "little")
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"\xa0" + size + block + LINES)
    return path


def utf_16(path: Path) -> Path:
    path = path.with_name("a.jsonl")
    path.write_bytes(LINES.decode().encode("utf-16"))
    return path


def json_array(path: Path) -> Path:
    path = path.with_name("a.json")
    path.write_text(json.dumps(TEXTS, indent=1))
    return path


def fifo(path: Path) -> Path:
    path = path.with_name("fifo.jsonl")
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(
            upper_case_gzip,
            ("gzip",),
            marks=not_mended_yet("every line is rejected as invalid UTF-8"),
        ),
        pytest.param(
            standard_zip,
            ("zstandard", "compressed"),
            marks=not_mended_yet("its name tells nothing; nothing says that it is compressed"),
        ),
        pytest.param(
            utf_16,
            ("utf-16",),
            marks=not_mended_yet("every line is rejected as invalid UTF-8; nothing says UTF-16"),
        ),
        pytest.param(
            json_array,
            ("one json object a line",),
            marks=not_mended_yet("said to lack `source`, which listings of TSV files have"),
        ),
        pytest.param(
            fifo, ("fifo", "pipe"), marks=not_mended_yet("the command waits for a writer for ever")
        ),
    ],
)
def test_a_file_is_read_or_refused_by_name(
    tmp_path, commands, model, make: Callable[[Path], Path], words: tuple[str, ...]
):
    given = make(tmp_path / "input")
    done = preprocess(commands, "text", model, tmp_path / "out", given, seconds=8)
    if done.ran.code == 0:
        assert json.loads((tmp_path / "out.json").read_text())["num_samples"] == len(TEXTS)
    else:
        message = done.ran.err.lower().replace(given.name.lower(), "")
        assert done.ran.code == 2 and any(word in message for word in words), done.ran.err


@not_mended_yet("the message names neither the file nor what is wrong with it")
def test_standard_input_is_read_or_refused_by_name(tmp_path, commands, model):
    given = ("/dev/stdin", "--format", "jsonl")
    done = preprocess(commands, "text", model, tmp_path / "out", *given, stdin=LINES, seconds=10)
    if done.ran.code == 0:
        assert json.loads((tmp_path / "out.json").read_text())["num_samples"] == len(TEXTS)
    else:
        assert done.ran.code == 2 and "/dev/stdin" in done.ran.err
        assert "pipe" in done.ran.err or "regular file" in done.ran.err


@not_mended_yet("a reject names its file without the folder")
def test_a_reject_says_which_of_two_files_of_one_name_it_stood_in(tmp_path, commands, model):
    inputs = [
        write_jsonl(tmp_path / folder / "meta.jsonl", [{"text": ""}, *TEXTS])
        for folder in ("first", "second")
    ]
    done = preprocess(commands, "text", model, tmp_path / "out", inputs).must_succeed()
    sources = [reject["source"] for reject in done.rejects]
    assert len(sources) == 2
    assert "first" in sources[0] and "second" in sources[1]


@not_mended_yet("a folder is always taken for InstructPix2Pix's")
def test_a_folder_of_img2dataset_files_is_read(tmp_path, commands, model):
    folder = tmp_path / "laion" / "00000"
    folder.mkdir(parents=True)
    for number, words in enumerate(("a red house", "a small dog")):
        name = f"{number:09d}"
        (folder / f"{name}.jpg").write_bytes(jpeg(number))
        (folder / f"{name}.txt").write_text(words)
        info = {"caption": words, "key": name, "status": "success"}
        (folder / f"{name}.json").write_text(json.dumps(info))
    done = preprocess(commands, "caption", model, tmp_path / "out", tmp_path / "laion")
    assert [sample.images[0] for sample in done.samples.values()] == [jpeg(0), jpeg(1)]


@not_mended_yet("links to folders are not followed, so nothing is found")
def test_linked_folders_of_instruct_pix2pix_are_read(tmp_path, commands, model):
    real, root = tmp_path / "disk2" / "0001", tmp_path / "edits"
    real.mkdir(parents=True)
    root.mkdir()
    prompt = {"input": "a dog", "edit": "make it red", "output": "a red dog"}
    (real / "prompt.json").write_text(json.dumps(prompt))
    for end in "01":
        (real / f"7_{end}.jpg").write_bytes(jpeg(int(end)))
    (root / "0001").symlink_to(real, target_is_directory=True)
    done = preprocess(commands, "edit", model, tmp_path / "out", root)
    assert [sample.images for sample in done.samples.values()] == [[jpeg(0), jpeg(1)]]


@pytest.mark.parametrize(
    "mark",
    [
        b"",
        pytest.param(
            "\ufeff".encode(),
            marks=not_mended_yet("the byte order mark becomes a part of the first column's name"),
        ),
    ],
)
def test_open_images_list_is_read_with_a_byte_order_mark_too(tmp_path, commands, mark):
    (tmp_path / "list.csv").write_bytes(mark + b"ImageID,Rotation\n0a1b,0.0\n")
    (tmp_path / "0a1b.jpg").write_bytes(jpeg(0))
    write_jsonl(tmp_path / "captions.jsonl", [{"key": "0a1b", "caption": "a dog"}])
    done = commands.tool(
        "build_instruct_data",
        *("--input", tmp_path / "list.csv", "--captions", tmp_path / "captions.jsonl"),
        *("--entities", "noun-phrases", "--output", tmp_path / "built"),
    )
    assert done.code == 0, done.err
    rows = [
        json.loads(line)
        for path in (tmp_path / "built" / "entities").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert [row["key"] for row in rows] == ["0a1b"]
