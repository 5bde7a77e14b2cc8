"""Each kind of bad record is left out with its own reason, and nothing else is."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from tests.support.data_helpers import (
    encode_image,
    noise_image,
    write_jsonl,
    write_parquet,
    write_tar,
    write_tokenizer,
)
from tests.support.dataset_files import info_of, read_samples


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("rejects"))


def run(model: Path, kind: str, path: Path, **options) -> tuple[list, list]:
    """(samples, rejects)."""
    prefix = path.parent / "out"
    job = PreprocessJob(kind, (str(path),), str(model), str(prefix), options=Options(**options))
    preprocess(job, lambda *_: None)
    lines = Path(f"{prefix}.rejects.jsonl").read_text().splitlines()
    return read_samples(prefix, kind != "text"), [json.loads(line) for line in lines]


def png(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header says this; its pixels are missing where they would be many."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    channels = {0: 1, 2: 3}[colour]
    rows = (b"\0" + b"\x80" * (width * channels * bits // 8)) * height if width < 100 else b""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(image: Image.Image, image_format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def animation(image_format: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    return saved(frames[0], image_format, save_all=True, append_images=frames[1:])


WHOLE_JPEG = noise_image(3, 64, 64, "JPEG")
BAD_IMAGES = {
    "image is truncated": [
        *(WHOLE_JPEG[:-300], noise_image(3, 64, 64)[:-200], noise_image(3, 64, 64)[:-20])
    ],
    "image is an empty file": [b""],
    "image is a web page": [b"<!DOCTYPE html><html>", b"\n <html><body>403"],
    "image has zero size": [png(0, 7), png(7, 0)],
    "image is CMYK": [saved(Image.new("CMYK", (16, 16)), "JPEG")],
    "image has more than 16 bits a channel": [
        saved(Image.new("I", (4, 4)), "TIFF"),
        saved(Image.new("F", (4, 4)), "TIFF"),
    ],
    "image is animated": [animation("GIF"), animation("PNG"), animation("WEBP")],
    "image has too many pixels": [png(30_000, 30_000), png(9_460, 9_460)],
    "image is not a known image format": [b"\xff\xd8 no picture", bytes(100)],
}


def test_bad_images(tmp_path, model):
    records, reasons = [], []
    for reason, images in BAD_IMAGES.items():
        for image in images:
            name = f"{len(records)}.jpg"
            (tmp_path / name).write_bytes(image)
            records.append({"key": name, "image": name, "caption": "red dog"})
            reasons.append(reason)
    (tmp_path / "good.jpg").write_bytes(WHOLE_JPEG)
    (tmp_path / "small.png").write_bytes(noise_image(4))
    for name in ("good.jpg", "small.png"):
        records.append({"key": name.split(".")[0], "image": name, "caption": "red dog"})
    path = write_jsonl(tmp_path / "a.jsonl", records)
    samples, rejects = run(model, "caption", path)
    found = [(r["source"], r["key"], r["reason"]) for r in rejects]
    expected = [(f"a.jsonl:{i + 1}", f"{i}.jpg", reason) for i, reason in enumerate(reasons)]
    assert found == expected
    assert [info_of(sample)["key"] for sample in samples] == ["good", "small"]
    # A header says nothing about what follows it: only the truncated files pass.
    samples, rejects = run(model, "caption", path, verify_images="header")
    assert [r["reason"] for r in rejects] == [r for r in reasons if r != "image is truncated"]
    assert len(samples) == 5
    samples, rejects = run(model, "caption", path, max_image_pixels=64 * 64 - 1)
    assert rejects[-1] == {
        "source": f"a.jsonl:{len(records) - 1}",
        "key": "good",
        "reason": "image has too many pixels",
        "detail": "64 x 64",
    }
    samples, rejects = run(model, "caption", path, min_image_side=13)
    assert rejects[-1]["reason"] == "image is too small" and len(samples) == 1


def test_a_camera_image_with_a_preview_is_one_image(tmp_path, model):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    (tmp_path / "a.jpg").write_bytes(data)
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": "a.jpg", "caption": "red"}])
    assert len(run(model, "caption", path)[0]) == 1


BAD_TEXTS = {
    "invalid UTF-8": b'{"text": "\xff\xfe"}',
    "not JSON": b'{"text": ',
    "not a JSON object": b'["text"]',
    "no field text": b'{"words": "a"}',
    "text is null": b'{"text": null}',
    "text is not text": b'{"text": 3}',
    "empty text": b'{"text": " \\n"}',
    "text is not Unicode": b'{"text": "a \\ud800 b"}',
}
BAD_CAPTIONS = {
    "caption is not Unicode": b'{"caption": "a \\ud800 b", "image": "p.png"}',
    "caption without tokens": b'{"caption": "\\u200b", "image": "p.png"}',
    # The key would be written to the dataset, too.
    "text is not Unicode": b'{"key": "\\ud800", "caption": "red", "image": "p.png"}',
    "not JSON": b'{"caption": "red", "image": "p.png", "n": ' + b"9" * 5000 + b"}",
}


def test_bad_texts(tmp_path, model):
    lines = [b'{"text": "red dog"}', *BAD_TEXTS.values(), b'{"text": "a house"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    samples, rejects = run(model, "text", tmp_path / "a.jsonl")
    assert [(r["source"], r["reason"]) for r in rejects] == [
        (f"a.jsonl:{i + 2}", reason) for i, reason in enumerate(BAD_TEXTS)
    ]
    assert len(samples) == 2
    (tmp_path / "b.txt").write_bytes(b"red dog\n\n\xff\xfe\n\nhouse")
    samples, rejects = run(model, "text", tmp_path / "b.txt")
    assert [(r["source"], r["reason"]) for r in rejects] == [("b.txt#2", "invalid UTF-8")]


def test_captions_that_cannot_be_tokenised(tmp_path, model):
    """Each of them once ended the run, or came to be a sample of no text."""
    (tmp_path / "p.png").write_bytes(noise_image(1))
    good = b'{"caption": "red dog", "image": "p.png"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*BAD_CAPTIONS.values(), good]))
    samples, rejects = run(model, "caption", tmp_path / "a.jsonl")
    assert [r["reason"] for r in rejects] == list(BAD_CAPTIONS) and len(samples) == 1
    edit = {"caption": "red", "image": "p.png", "instruction": "\u200b", "target": "p.png"}
    path = write_jsonl(tmp_path / "e.jsonl", [edit, edit | {"instruction": "blue"}])
    samples, rejects = run(model, "edit", path)
    assert [r["reason"] for r in rejects] == ["instruction without tokens"] and len(samples) == 1


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path, model):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "red"}\r\n{"text": "blue"}\r\n')
    samples, rejects = run(model, "text", tmp_path / "a.jsonl")
    assert len(samples) == 2 and not rejects


def test_pillow_says_nothing_about_odd_tags(tmp_path, model, recwarn):
    data = bytearray(saved(Image.new("RGB", (8, 8)), "TIFF"))
    first_tag = struct.unpack_from("<I", data, 4)[0] + 2
    struct.pack_into("<I", data, first_tag + 4, 1 << 20)  # longer than the file
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(OSError), pytest.warns(UserWarning, match="Truncated File Read"):
        Image.open(tmp_path / "a.tif").load()
    recwarn.clear()
    (tmp_path / "p.png").write_bytes(noise_image(1))
    records = [{"caption": "red", "image": name} for name in ("a.tif", "p.png")]
    samples, _ = run(model, "caption", write_jsonl(tmp_path / "a.jsonl", records))
    assert len(samples) == 1 and not recwarn.list


def entity(**changes) -> dict:
    return {"text": "dog", "span": [2, 5], "image": "p.png", "mask": "m.png"} | changes


BAD_ENTITIES = {
    "entity span outside the caption": entity(span=[2, 99]),
    "entity span is not [start, end]": entity(span=[2]),
    "entity span does not hold its text": entity(span=[0, 3]),
    "no mask and no alpha channel": {k: v for k, v in entity().items() if k != "mask"},
    "mask and its image differ in size": entity(mask="small.png"),
    "mask has colours": entity(mask="p.png"),
    "mask is empty": entity(mask="black.png"),
    "mask cannot be read": entity(mask="gone.png"),
    "no field image": {k: v for k, v in entity().items() if k != "image"},
    "image is a web address, not a file": entity(image="https://x/p.png"),
    "entity is not an object": 5,
}


def test_bad_entities(tmp_path, model):
    mask = np.zeros((12, 12), np.uint8)
    (tmp_path / "black.png").write_bytes(encode_image(mask))
    mask[3:6] = 255
    (tmp_path / "m.png").write_bytes(encode_image(mask))
    (tmp_path / "small.png").write_bytes(encode_image(mask[:6]))
    (tmp_path / "p.png").write_bytes(noise_image(1))
    good = [entity(), entity(mask=None)]
    records = [
        {"caption": "a dog", "image": "p.png", "entities": [item]}
        for item in [*BAD_ENTITIES.values(), *good]
    ]
    samples, rejects = run(model, "compositional", write_jsonl(tmp_path / "a.jsonl", records))
    assert [r["reason"] for r in rejects] == list(BAD_ENTITIES)
    assert [info_of(s)["entities"][0]["has_mask"] for s in samples] == [True, False]


def test_tar_members_that_lack_or_lie(tmp_path, model):
    image, good = noise_image(1), [("z.png", noise_image(2)), ("z.txt", b"red dog")]
    cases = {
        "no field image": [("a.txt", b"red")],
        "no field caption": [("b.png", image)],
        "tar member leaves its folder": [("../../c.png", image), ("../../c.txt", b"red")],
        "tar member stands there twice": [("e.png", image), ("e.png", image)],
        "not JSON": [("f.png", image), ("f.json", b"{")],
        "invalid UTF-8": [("g.png", image), ("g.txt", b"\xff\xfe")],
    }
    members = [member for group in cases.values() for member in group]
    path = write_tar(tmp_path / "a.tar", [*members, ("/abs/d.png", image), *good])
    samples, rejects = run(model, "caption", path)
    assert [r["reason"] for r in rejects] == [*cases, "tar member leaves its folder"]
    assert [info_of(s)["key"] for s in samples] == ["z"]
    assert not (tmp_path.parent / "c.png").exists()
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, data in (("a.txt", b"red"), *good):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert [r["reason"] for r in run(model, "caption", path)[1]] == [
        "tar member is a link or a device"
    ]


def test_parquet_nulls_and_damage(tmp_path, model):
    image = noise_image(1)
    rows = [
        {"image": image, "caption": None},
        {"image": None, "caption": "red dog"},
        {"image": image, "caption": "red dog"},
    ]
    path = write_parquet(tmp_path / "a.parquet", rows)
    samples, rejects = run(model, "caption", path)
    assert [(r["source"], r["reason"]) for r in rejects] == [
        ("a.parquet:1", "caption is null"),
        ("a.parquet:2", "image is null"),
    ]
    assert len(samples) == 1
    data = path.read_bytes()
    named = write_parquet(tmp_path / "c.parquet", [rows[2] | {"n": f"name {i}"} for i in range(5)])
    named.write_bytes(named.read_bytes().replace(b"name 3", b"nam\xff 3"))
    samples, rejects = run(model, "caption", named)
    assert [(r["source"], r["reason"]) for r in rejects] == [("c.parquet:4", "invalid UTF-8")]
    assert len(samples) == 4
    pyarrow = pytest.importorskip("pyarrow")
    years = pyarrow.array([0, 10**18, 5]).cast(pyarrow.timestamp("us"))  # the second: 33658
    table = pyarrow.Table.from_pylist([rows[2]] * 3).append_column("made", years)
    pyarrow.parquet.write_table(table, named)
    samples, rejects = run(model, "caption", named)
    assert [(r["source"], r["reason"]) for r in rejects] == [("c.parquet:2", "row cannot be read")]
    assert info_of(samples[1])["made"] == "1970-01-01 00:00:00.000005"
    for damaged, reason in (
        (data[:-4], "not a Parquet file"),
        (data[:20] + bytes(40) + data[60:], "Parquet file is damaged"),
    ):
        path.write_bytes(damaged)
        good = write_parquet(tmp_path / "b.parquet", rows[2:])
        job = PreprocessJob("caption", (str(path), str(good)), str(model), str(tmp_path / "o"))
        preprocess(job, lambda *_: None)
        assert reason in (tmp_path / "o.rejects.jsonl").read_text()
        assert len(read_samples(tmp_path / "o")) >= 1


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("caption", "id\tred dog\tAAAA\t5", "wrong number of TSV columns"),
        ("caption", "id\tred dog\t!!!!\t5\t5", "image is not base64"),
        ("edit", "red\tblue\tAAAA", "wrong number of TSV columns"),
        ("edit", "red\tblue\tAAAA\tAAAA\tAAAA", "wrong number of TSV columns"),
        ("compositional", "red dog\tdog\tAAAA\tAAAA", "wrong number of TSV columns"),
    ],
)
def test_tsv_rows(tmp_path, model, kind, row, reason):
    (tmp_path / "a.tsv").write_text(f"{row}\n")
    with pytest.raises(ValueError, match="no usable record"):
        run(model, kind, tmp_path / "a.tsv")
    (reject,) = map(json.loads, (tmp_path / "out.rejects.jsonl").read_text().splitlines())
    assert (reject["source"], reject["reason"]) == ("a.tsv:1", reason)


def test_of_one_key_in_one_file_the_first_stays(tmp_path, model, monkeypatch):
    monkeypatch.setattr("megatron_kosmosg.preprocess.input_files.MAX_RECORDS", 2)
    for name, keys in (("a", "xyxzy"), ("b", "xw")):
        records = []
        for i, key in enumerate(keys):
            (tmp_path / f"{name}{i}.png").write_bytes(noise_image(i))
            records.append({"key": key, "image": f"{name}{i}.png", "caption": f"red {i}"})
        records.append({"image": f"{name}0.png", "caption": "no key"})
        records.append({"image": f"{name}1.png", "caption": "no key"})
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    prefix = tmp_path / "out"
    job = PreprocessJob("caption", (str(tmp_path / "*.jsonl"),), str(model), str(prefix), workers=3)
    preprocess(job, lambda *_: None)
    lines = Path(f"{prefix}.rejects.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"source": "a.jsonl:3", "key": "x", "reason": "duplicate key"},
        {"source": "a.jsonl:5", "key": "y", "reason": "duplicate key"},
    ]
    samples = read_samples(prefix)
    captions = [info_of(sample)["caption"] for sample in samples]
    assert (
        captions
        == ["red 0", "red 1", "red 3", "no key", "no key", "red 0", "red 1"] + ["no key"] * 2
    )
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    assert (manifest["num_samples"], manifest["num_images"]) == (9, 9)
    assert manifest["num_rejects"] == 2
    images = [data for sample in samples for mode, data in sample if mode == 1]
    assert images[2] == noise_image(3)


def test_mmc4_and_obelics_documents(tmp_path, model):
    (tmp_path / "p.png").write_bytes(noise_image(1))
    image = [{"image_name": "p.png", "matched_text_index": 5}]
    records = [
        {"text_list": ["red"], "image_info": image},
        {"texts": ["red", None], "images": [None]},
        {"texts": ["red"], "images": ["p.png"]},
        {"texts": ["red", None], "images": [None, "http://x"]},
        {"content": [{"image": "p.png"}]},
        {"content": [{"text": "red", "image": "p.png"}]},
        {"words": []},
        {"content": [{"image": "p.png"}, {"text": "red"}]},
    ]
    samples, rejects = run(model, "interleaved", write_jsonl(tmp_path / "a.jsonl", records))
    assert [r["reason"] for r in rejects] == [
        "matched_text_index outside the text",
        "texts and images differ in length",
        "place with both or neither of text and image",
        "image is a web address, not a file",
        "document without text",
        "content item is neither text nor image",
        "no field content",
    ]
    assert len(samples) == 1


def test_instruct_pix2pix_folders(tmp_path, model):
    root = tmp_path / "ip2p"
    for name, prompt in (("a", b"{"), ("b", b'{"input": "red", "edit": "blue"}'), ("c", None)):
        (root / name).mkdir(parents=True)
        if prompt is not None:
            (root / name / "prompt.json").write_bytes(prompt)
    (root / "b" / "1_0.jpg").write_bytes(noise_image(1))
    (root / "seeds.json").write_text(json.dumps([["a", []], ["b", [1]], ["c", [2]], ["d", [3]]]))
    with pytest.raises(ValueError, match="no usable record"):
        run(model, "edit", root)
    lines = (tmp_path / "out.rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == [
        "not JSON",
        "target cannot be read",
        "prompt.json cannot be read",
        "prompt folder is missing",
    ]
