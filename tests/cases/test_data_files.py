"""Files as users have them: every form is read, or refused in words that name it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.data_helpers import encode_image, write_jsonl
from tests.support.data_inputs import preprocess

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


@pytest.fixture(scope="module")
def stored_lines(tmp_path_factory, commands, model) -> bytes:
    """The .bin file of a dataset of LINES."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "a.jsonl").write_bytes(LINES)
    done = preprocess(commands, "text", model, folder / "out", folder / "a.jsonl")
    return Path(f"{done.must_succeed().prefix}.bin").read_bytes()


def bzip2(path: Path) -> Path:
    path = path.with_name("a.jsonl.bz2")
    path.write_bytes(bz2.compress(LINES))
    return path


def xz(path: Path) -> Path:
    path = path.with_name("a.jsonl.xz")
    path.write_bytes(lzma.compress(LINES))
    return path


def packed_against_its_name(path: Path) -> Path:
    path = path.with_name("a.jsonl")
    path.write_bytes(gzip.compress(LINES))
    return path


def unpacked_against_its_name(path: Path) -> Path:
    path = path.with_name("a.jsonl.gz")
    path.write_bytes(LINES)
    return path


def mark_before_text(path: Path) -> Path:
    path = path.with_name("a.txt")
    path.write_bytes("\ufeffa red house .\n\na small dog .\n".encode())
    return path


@pytest.mark.parametrize(
    "make",
    [
        upper_case_gzip,
        standard_zip,
        bzip2,
        xz,
        packed_against_its_name,
        unpacked_against_its_name,
        mark_before_text,
    ],
)
def test_a_file_is_read_whatever_it_is_packed_in(
    tmp_path, commands, model, stored_lines: bytes, make: Callable[[Path], Path]
):
    done = preprocess(commands, "text", model, tmp_path / "out", make(tmp_path / "input"))
    assert Path(f"{done.must_succeed().prefix}.bin").read_bytes() == stored_lines


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (utf_16, ("utf-16", "iconv")),
        (json_array, ("one json object a line", "jq -c")),
        (fifo, ("pipe (fifo)", "write it to a file")),
    ],
)
def test_a_file_is_refused_by_name(
    tmp_path, commands, model, make: Callable[[Path], Path], words: tuple[str, ...]
):
    source = make(tmp_path / "input")
    done = preprocess(commands, "text", model, tmp_path / "out", source, seconds=60)
    message = done.ran.err.lower()
    assert done.ran.code == 2 and all(word in message for word in (*words, source.name.lower()))


def test_standard_input_is_refused_by_name(tmp_path, commands, model):
    source = ("/dev/stdin", "--format", "jsonl")
    done = preprocess(commands, "text", model, tmp_path / "out", *source, stdin=LINES, seconds=60)
    assert done.ran.code == 2 and "/dev/stdin" in done.ran.err
    assert "regular file" in done.ran.err


def test_a_reject_says_which_of_two_files_of_one_name_it_stood_in(tmp_path, commands, model):
    inputs = [
        write_jsonl(tmp_path / folder / "meta.jsonl", [{"text": ""}, *TEXTS])
        for folder in ("first", "second")
    ]
    done = preprocess(commands, "text", model, tmp_path / "out", inputs).must_succeed()
    sources = [reject["source"] for reject in done.rejects]
    assert sources == ["first/meta.jsonl:1", "second/meta.jsonl:1"]


def test_samples_without_a_key_are_called_by_their_path(tmp_path, commands, model):
    for level, folder in enumerate(("first", "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").write_bytes(jpeg(level))
        records = [{"image": "a.jpg", "caption": "a house"}]
        write_jsonl(tmp_path / folder / "meta.jsonl", records)
    pattern = tmp_path / "*" / "meta.jsonl"
    done = preprocess(commands, "caption", model, tmp_path / "out", pattern).must_succeed()
    assert {key: sample.images for key, sample in done.samples.items()} == {
        "first/meta.jsonl:1": [jpeg(0)],
        "second/meta.jsonl:1": [jpeg(1)],
    }


def test_a_folder_of_img2dataset_files_is_read(tmp_path, commands, model):
    folder = tmp_path / "laion" / "00000"
    folder.mkdir(parents=True)
    for number, words in enumerate(("a red house", "a small dog")):
        name = f"{number:09d}"
        (folder / f"{name}.jpg").write_bytes(jpeg(number))
        (folder / f"{name}.txt").write_text(words)
        info = {"caption": words, "key": name, "status": "success"}
        (folder / f"{name}.json").write_text(json.dumps(info))
    (folder / "000000002.txt").write_text("a picture that is gone")
    (tmp_path / "laion" / "00000_stats.json").write_text("{}")
    (tmp_path / "laion" / "00000.parquet").write_bytes(b"a table")
    done = preprocess(commands, "caption", model, tmp_path / "out", tmp_path / "laion")
    assert [sample.images[0] for sample in done.samples.values()] == [jpeg(0), jpeg(1)]
    assert [(reject["source"], reject["reason"]) for reject in done.rejects] == [
        ("00000/000000002", "no field image")
    ]


def test_a_folder_of_tables_is_answered_with_the_way_to_give_them(tmp_path, commands, model):
    (tmp_path / "laion").mkdir()
    (tmp_path / "laion" / "a.tar").write_bytes(b"a tar")
    done = preprocess(commands, "caption", model, tmp_path / "out", tmp_path / "laion")
    assert done.ran.code == 2 and "laion/*.tar'" in done.ran.err
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text("a dataset")
    (tmp_path / "hub" / "data" / "0.parquet").write_bytes(b"a table")
    done = preprocess(commands, "caption", model, tmp_path / "out", tmp_path / "hub")
    assert done.ran.code == 2 and "hub/**/*.parquet'" in done.ran.err


def saved_dataset(folder: Path, captions: list[str], **state: object) -> Path:
    """As `datasets.Dataset.save_to_disk` leaves it: Arrow streams and a list of them."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = []
    for number, caption in enumerate(captions):
        images = [{"bytes": jpeg(number), "path": None}]
        table = pyarrow.table({"image": images, "text": [caption]})
        names.append(f"data-{number:05d}-of-{len(captions):05d}.arrow")
        with pyarrow.ipc.new_stream(str(folder / names[-1]), table.schema) as stream:
            stream.write_table(table)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files} | state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_folder_that_hugging_face_datasets_saved_is_read(tmp_path, commands, model):
    folder = saved_dataset(tmp_path / "saved", ["a red house", "a small dog"])
    done = preprocess(commands, "caption", model, tmp_path / "out", folder).must_succeed()
    found = [(sample.info["caption"], sample.images) for sample in done.samples.values()]
    assert found == [("a red house", [jpeg(0)]), ("a small dog", [jpeg(1)])]


def test_what_of_a_saved_folder_is_not_read_is_answered_with_what_to_do(tmp_path, commands, model):
    chosen = {"_indices_data_files": [{"filename": "indices.arrow"}]}
    folder = saved_dataset(tmp_path / "chosen", ["a red house"], **chosen)
    done = preprocess(commands, "caption", model, tmp_path / "out", folder)
    assert done.ran.code == 2 and "flatten_indices().save_to_disk" in done.ran.err
    splits = saved_dataset(tmp_path / "splits" / "train", ["a red house"]).parent
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    done = preprocess(commands, "caption", model, tmp_path / "out", splits)
    assert done.ran.code == 2 and f"--input {splits / 'train'}" in done.ran.err


def test_linked_folders_of_instruct_pix2pix_are_read(tmp_path, commands, model):
    real, root = tmp_path / "disk2" / "0001", tmp_path / "edits"
    real.mkdir(parents=True)
    root.mkdir()
    prompt = {"input": "a dog", "edit": "make it red", "output": "a red dog"}
    (real / "prompt.json").write_text(json.dumps(prompt))
    for end in "01":
        (real / f"7_{end}.jpg").write_bytes(jpeg(int(end)))
    (root / "0001").symlink_to(real, target_is_directory=True)
    (root / "0002").symlink_to(tmp_path / "gone", target_is_directory=True)
    (root / "0003").symlink_to(root, target_is_directory=True)
    (root / "0004").mkdir()
    (root / "0004" / "7_0.jpg").write_bytes(jpeg(0))
    done = preprocess(commands, "edit", model, tmp_path / "out", root, seconds=60)
    assert [sample.images for sample in done.samples.values()] == [[jpeg(0), jpeg(1)]]
    assert sorted((reject["source"], reject["reason"]) for reject in done.rejects) == [
        ("0002", "prompt folder is missing"),
        ("0004", "prompt.json cannot be read"),
    ]


@pytest.mark.parametrize("mark", [b"", "\ufeff".encode()])
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
