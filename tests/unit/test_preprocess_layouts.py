"""Every input layout that docs/data.md lists becomes the sample that its words and images say."""

from __future__ import annotations

import base64
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.preprocess.counts import last_line
from megatron_kosmosg.preprocess.input_files import find_inputs
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from megatron_kosmosg.preprocess.tags import mask_between, tag_entities
from tests.support.data_helpers import (
    encode_image,
    noise_image,
    write_jsonl,
    write_parquet,
    write_tar,
    write_tokenizer,
)
from tests.support.dataset_files import images_of, info_of, outline, read_samples, texts_of


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    return Tokenizer(model)


def run(model: Path, kind: str, *inputs: Path, **job) -> tuple[list, list[dict]]:
    """(samples, rejects)."""
    prefix = inputs[0].parent / f"out-{kind}"
    names = tuple(map(str, inputs))
    preprocess(PreprocessJob(kind, names, str(model), str(prefix), **job), lambda *_: None)
    rejects = Path(f"{prefix}.rejects.jsonl").read_text().splitlines()
    return read_samples(prefix, kind != "text"), [json.loads(line) for line in rejects]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_plain_text_is_cut_where_it_is_asked(tmp_path, model, tokenizer):
    path = tmp_path / "corpus.txt"
    path.write_text("red dog .\nruns over\n\n\na house\n \nsnow .")
    for documents, expected in (
        ("blank", ["red dog . runs over", "a house", "snow ."]),
        ("line", ["red dog .", "runs over", "a house", "snow ."]),
        ("file", ["red dog . runs over a house snow ."]),
    ):
        options = Options(text_documents=documents)
        samples, _ = run(model, "text", path, options=options)
        tokens = [tokenizer.encode(text) + [tokenizer.eos_id] for text in expected]
        found = [np.frombuffer(sample[0][1], "<i4").tolist() for sample in samples]
        assert found == tokens, documents
        packed = tmp_path / "corpus.txt.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert run(model, "text", packed, options=options)[0] == samples, documents
        packed.unlink()


def test_text_of_jsonl_gzip_and_parquet_is_the_same(tmp_path, model):
    records = [{"text": f"red dog {word} ."} for word in ("snow", "garden", "house")]
    plain = write_jsonl(tmp_path / "a.jsonl", records)
    packed = tmp_path / "b.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    expected, _ = run(model, "text", plain)
    assert len(expected) == 3
    assert run(model, "text", packed)[0] == expected
    assert run(model, "text", packed, limit=2)[0] == expected[:2]
    table = write_parquet(tmp_path / "c.parquet", records)
    assert run(model, "text", table)[0] == expected
    renamed = write_jsonl(tmp_path / "d.jsonl", [{"body": r["text"]} for r in records])
    options = Options(fields=(("text", "body"),))
    assert run(model, "text", renamed, options=options)[0] == expected


def test_img2dataset_tars(tmp_path, model, tokenizer):
    images = [noise_image(i, image_format="JPEG") for i in range(3)]
    members = []
    for i, image in enumerate(images):
        info = {"url": f"http://x/{i}", "caption": "ignored", "key": "other", "status": "success"}
        if i == 2:
            info["caption"] = "red dog"
        members += [(f"./00000000{i}.jpg", image), (f"./00000000{i}.json", json.dumps(info))]
        members += [(f"./00000000{i}.txt", "blue house")] if i != 2 else []
    del members[1]  # a sample may lack its JSON
    data = [(name, d if isinstance(d, bytes) else d.encode()) for name, d in members]
    data[1] = (data[1][0], b"blue house")
    path = write_tar(tmp_path / "00000.tar", data)
    samples, rejects = run(model, "caption", path)
    assert not rejects
    assert [images_of(sample) for sample in samples] == [[p] for p in images]
    assert [info_of(s)["key"] for s in samples] == ["000000000", "000000001", "000000002"]
    assert texts_of(samples[0], tokenizer) == ["blue house"]
    assert texts_of(samples[2], tokenizer) == ["red dog"]
    assert info_of(samples[1])["url"] == "http://x/1"


def test_tars_are_cut_into_shards_and_limited_without_changing_the_samples(
    tmp_path, model, monkeypatch
):
    members = [
        (f"{'long/' * 30}{i:03d}.{end}", data)
        for i in range(11)
        for end, data in (("png", noise_image(i)), ("txt", b"red dog"))
    ]
    path = write_tar(tmp_path / "a.tar", members)
    whole, _ = run(model, "caption", path)
    assert len(whole) == 11
    monkeypatch.setattr("megatron_kosmosg.preprocess.input_files.MAX_RECORDS", 3)
    (source,) = find_inputs([str(path)], KINDS["caption"])
    from megatron_kosmosg.preprocess.record_readers import ShardSize

    shards = source.reader(Options()).shards(path, None, ShardSize(3, 1, 1 << 30))
    assert [shard.num_records for shard in shards] == [3, 3, 3, None]
    assert run(model, "caption", path, workers=2)[0] == whole
    assert run(model, "caption", path, limit=7)[0] == whole[:7]


def test_captions_of_parquet_with_bytes_paths_and_hugging_face_structs(tmp_path, model, tokenizer):
    images = [noise_image(i) for i in range(3)]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "p.png").write_bytes(images[1])
    img2dataset = [{"jpg": images[0], "caption": "red dog", "key": "0", "width": 12}]
    paths = [{"image": "images/p.png", "text": "blue dog"}]
    structs = [
        {"image": {"bytes": images[2], "path": "x.png"}, "caption": "a house"},
        {"image": {"bytes": None, "path": "images/p.png"}, "caption": "snow"},
    ]
    tables = [
        write_parquet(tmp_path / f"{name}.parquet", rows)
        for name, rows in (("a", img2dataset), ("b", paths), ("c", structs))
    ]
    samples, rejects = run(model, "caption", *tables)
    assert not rejects
    assert [images_of(s)[0] for s in samples] == [images[i] for i in (0, 1, 2, 1)]
    assert [texts_of(s, tokenizer) for s in samples] == [
        ["red dog"],
        ["blue dog"],
        ["a house"],
        ["snow"],
    ]
    assert info_of(samples[0]) == {"key": "0", "caption": "red dog", "width": 12}


def test_image_root_and_hugging_face_image_folders(tmp_path, model):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "p.png").write_bytes(noise_image(1))
    path = write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "p.png", "text": "red dog"}])
    options = Options(image_root=str(tmp_path / "elsewhere"))
    samples, _ = run(model, "caption", path, options=options)
    assert images_of(samples[0]) == [noise_image(1)]


def authors_listing(folder: Path, name: str, rows: list[list[str]], data: bool = True) -> Path:
    target = folder / "data" if data else folder
    (folder / "json").mkdir(exist_ok=True)
    target.mkdir(exist_ok=True)
    (target / name).write_text("".join("\t".join(row) + "\n" for row in rows))
    listing = [{"source": [name], "source_lang": "x", "name": "x"}]
    (folder / "json" / "train.json").write_text(json.dumps(listing))
    return folder / "json" / "train.json"


def test_the_authors_laion_rows(tmp_path, model, tokenizer):
    image = noise_image(5, image_format="JPEG")
    rows = [["url", "red dog", b64(image), "12", "12"], ["u", "x", b64(image), "None", "3"]]
    listing = authors_listing(tmp_path, "0.tsv", rows, data=False)
    samples, rejects = run(model, "caption", listing)
    assert images_of(samples[0]) == [image] and texts_of(samples[0], tokenizer) == ["red dog"]
    assert [reject["reason"] for reject in rejects] == ["width or height is not a number"]


def test_the_authors_instruct_pix2pix_rows_give_a_sample_a_pair(tmp_path, model, tokenizer):
    images = [noise_image(i) for i in range(4)]
    listing = authors_listing(
        tmp_path, "0000.tsv", [["red dog", "make it blue", *map(b64, images)]]
    )
    samples, _ = run(model, "edit", listing)
    assert [images_of(s) for s in samples] == [images[:2], images[2:]]
    assert all(texts_of(s, tokenizer) == ["red dog", "make it blue"] for s in samples)
    assert [info_of(s)["key"] for s in samples] == ["0000.tsv:1/0", "0000.tsv:1/1"]


def test_a_listing_with_different_weights_is_refused(tmp_path, model):
    listing = authors_listing(tmp_path, "0.tsv", [])
    entries = [{"source": ["0.tsv"], "weight": weight} for weight in (1, 2)]
    listing.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="different weights"):
        run(model, "edit", listing)


def crops(seed: int) -> tuple[bytes, bytes, np.ndarray]:
    """A crop, the same with a white background, and the mask between them, resized as theirs."""
    rng = np.random.default_rng(seed)
    big = Image.fromarray(rng.integers(0, 200, (24, 24, 3), dtype=np.uint8))
    hard = np.zeros((24, 24), np.uint8)
    hard[6:20, 4:16] = 255
    white = Image.new("RGB", big.size, (255, 255, 255))
    on_white = Image.composite(big, white, Image.fromarray(hard))
    small = [np.asarray(image.resize((12, 12))) for image in (big, on_white)]
    mask = np.asarray(Image.fromarray(hard).resize((12, 12)))
    return encode_image(small[0]), encode_image(small[1]), mask


def test_the_authors_open_images_rows(tmp_path, model, tokenizer):
    target = noise_image(9)
    (dog, dog_white, dog_mask), (house, house_white, _) = crops(1), crops(2)
    tags = "small house, dog ,red,hill"
    row = ["a Dog and a small house", tags, target, house, house_white, dog, dog_white]
    columns = row[:2] + [b64(c) for c in (*row[2:], *[noise_image(3)] * 4)]
    samples, rejects = run(model, "compositional", authors_listing(tmp_path, "c.tsv", [columns]))
    assert not rejects
    (sample,) = samples
    entities = info_of(sample)["entities"]
    assert [(e["text"], e["span"], e["has_mask"]) for e in entities] == [
        ("Dog", [2, 5], True),
        ("small house", [12, 23], True),
    ]
    stored = outline(sample, tokenizer)
    assert stored[0] == target and stored[3] == dog and stored[7] == house
    mask = np.asarray(Image.open(io.BytesIO(stored[4])))
    difference = np.abs(mask.astype(int) - dog_mask)
    assert difference.max() <= 30 and difference.mean() < 2
    painted = Image.composite(
        Image.open(io.BytesIO(dog)), Image.new("RGB", (12, 12), "white"), Image.fromarray(mask)
    )
    difference = np.asarray(painted).astype(int) - np.asarray(Image.open(io.BytesIO(dog_white)))
    assert np.abs(difference).max() <= 40 and np.abs(difference).mean() < 2


def test_tags_that_become_no_entity_are_counted(tmp_path, model):
    columns = [
        "a dog",
        "dog,red,hill",
        *[b64(data) for data in [noise_image(9), *crops(1)[:2] * 3]],
    ]
    listing = authors_listing(tmp_path, "c.tsv", [columns])
    job = PreprocessJob("compositional", (str(listing),), str(model), str(tmp_path / "out"))
    report = preprocess(job, lambda *_: None)
    assert report.counts.left_out.total() == 2
    assert "2 entities left out" in last_line(report.counts)


def test_a_white_background_gives_back_a_hard_mask_exactly():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
    hard = (rng.random((9, 9)) < 0.5).astype(np.uint8) * 255
    white = Image.composite(image, Image.new("RGB", image.size, "white"), Image.fromarray(hard))
    found = np.asarray(Image.open(io.BytesIO(mask_between(image, white))))
    assert np.array_equal(found, hard)


@pytest.mark.parametrize(
    ("caption", "tags", "expected"),
    [
        ("a cat on a mat", ["mat", "cat"], [(1, [2, 5]), (0, [11, 14])]),
        ("a red cat", ["red", "cat"], [(1, [6, 9])]),
        ("a category", ["cat"], []),
        # "cat" is a word of two tags: dropped, as the authors do.
        ("a cat and a black cat", ["cat", "black cat"], [(1, [12, 21])]),
        # Each tag is looked for after the one before it.
        ("bird house and bird", ["bird house", "house"], [(0, [0, 10])]),
        ("dog house then dog", ["dog house", "dog"], [(0, [0, 9])]),
    ],
)
def test_tags_become_entities_as_the_authors_loader_has_it(caption, tags, expected):
    assert [(n, e["span"]) for n, e in tag_entities(caption, tags)] == expected


def test_instruct_pix2pix_folders_with_and_without_a_listing(tmp_path, model, tokenizer):
    root = tmp_path / "clip-filtered-dataset"
    images = {}
    for name, seeds, first in (
        ("shard-00/0000002", ("7", "8"), "input"),
        ("0001", ("3",), "caption"),
    ):
        folder = root / name
        folder.mkdir(parents=True)
        prompt = {first: "red dog", "edit": "make it blue", "output": "blue dog", "url": "u"}
        (folder / "prompt.json").write_text(json.dumps(prompt))
        (folder / "metadata.jsonl").write_text("{}")
        for seed in seeds:
            for end in "01":
                images[name, seed, end] = noise_image(len(images), image_format="JPEG")
                (folder / f"{seed}_{end}.jpg").write_bytes(images[name, seed, end])
    samples, _ = run(model, "edit", root)
    keys = [("0001", "3"), ("shard-00/0000002", "7"), ("shard-00/0000002", "8")]
    assert [info_of(s)["key"] for s in samples] == ["/".join(key) for key in keys]
    assert [images_of(s) for s in samples] == [[images[*k, "0"], images[*k, "1"]] for k in keys]
    assert texts_of(samples[0], tokenizer) == ["red dog", "make it blue"]
    assert info_of(samples[1])["output"] == "blue dog"
    (root / "seeds.json").write_text(json.dumps([["shard-00/0000002", ["8"]]]))
    samples, _ = run(model, "edit", root)
    assert [info_of(s)["key"] for s in samples] == ["shard-00/0000002/8"]


def test_instruct_pix2pix_parquet(tmp_path, model, tokenizer):
    before, after = noise_image(1), noise_image(2)
    row = {
        "original_prompt": "red dog",
        "original_image": {"bytes": before, "path": None},
        "edit_prompt": "make it blue",
        "edited_prompt": "blue dog",
        "edited_image": {"bytes": after, "path": None},
    }
    samples, _ = run(model, "edit", write_parquet(tmp_path / "a.parquet", [row]))
    assert outline(samples[0], tokenizer) == ["red dog", "make it blue", before, after]
    assert info_of(samples[0])["edited_prompt"] == "blue dog"


def test_mmc4_images_stand_before_their_sentence(tmp_path, model, tokenizer):
    names = ["a.png", "b.png", "c.png"]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(noise_image(i))
    record = {
        "text_list": ["a house .", "red dog .", "blue dog .", "snow ."],
        "image_info": [
            {"image_name": name, "matched_text_index": at, "raw_url": "u"}
            for name, at in zip(names, (2, 0, 2), strict=True)
        ],
        "similarity_matrix": [[0.1]],
        "url": "page",
    }
    samples, _ = run(model, "interleaved", write_jsonl(tmp_path / "docs.jsonl", [record]))
    a, b, c = (noise_image(i) for i in range(3))
    assert outline(samples[0], tokenizer) == [b, "a house . red dog .", a, c, "blue dog . snow ."]
    assert info_of(samples[0]) == {"key": "docs.jsonl:1", "url": "page"}


def test_obelics_and_the_options_for_images(tmp_path, model, tokenizer):
    a, b = noise_image(0), noise_image(1)
    missing = {"bytes": None, "path": "gone.png"}
    place = [{"bytes": data, "path": None} for data in (a, b)]
    rows = [
        {"images": [place[0], None, place[1], None], "texts": [None, "red dog .", None, "snow ."]},
        {"images": [missing, None, place[1]], "texts": [None, "a house .", None]},
        {"images": [None, None], "texts": ["blue dog .", " "]},
    ]
    path = write_parquet(tmp_path / "obelics.parquet", rows)
    samples, rejects = run(model, "interleaved", path)
    assert outline(samples[0], tokenizer) == [a, "red dog .", b, "snow ."]
    assert outline(samples[1], tokenizer) == ["blue dog ."]
    assert [reject["reason"] for reject in rejects] == ["image cannot be read"]
    options = Options(drop_bad_images=True, max_images=1, min_images=1)
    samples, rejects = run(model, "interleaved", path, options=options)
    assert outline(samples[0], tokenizer) == [a, "red dog .", "snow ."]
    assert outline(samples[1], tokenizer) == ["a house .", b]
    assert [reject["reason"] for reject in rejects] == ["document with too few images"]


def test_canonical_records_in_parquet_and_in_tars(tmp_path, model, tokenizer):
    a, b = noise_image(0), noise_image(1)
    rows = [{"content": [{"text": "red dog", "image": None}, {"text": None, "image": a}]}]
    samples, _ = run(model, "interleaved", write_parquet(tmp_path / "i.parquet", rows))
    assert outline(samples[0], tokenizer) == ["red dog", a]
    record = {"caption": "red dog", "image": "a.png", "instruction": "stop", "target": "b.png"}
    members = [("k.json", json.dumps(record).encode()), ("k.a.png", a), ("k.b.png", b)]
    samples, _ = run(model, "edit", write_tar(tmp_path / "e.tar", members))
    assert outline(samples[0], tokenizer) == ["red dog", "stop", a, b]


def test_the_alpha_channel_of_an_entity_is_kept_as_its_mask(tmp_path, model, tokenizer):
    pixels = np.full((12, 12, 4), 90, np.uint8)
    pixels[..., 3] = np.arange(144).reshape(12, 12)
    rgba = encode_image(pixels)
    (tmp_path / "e.png").write_bytes(rgba)
    (tmp_path / "t.png").write_bytes(noise_image(0))
    entity = {"text": "dog", "span": [2, 5], "image": "e.png"}
    record = {"caption": "a dog", "image": "t.png", "entities": [entity]}
    samples, _ = run(model, "compositional", write_jsonl(tmp_path / "c.jsonl", [record]))
    stored = outline(samples[0], tokenizer)
    assert info_of(samples[0])["entities"][0]["has_mask"]
    assert stored[3] == rgba
    mask = Image.open(io.BytesIO(stored[4]))
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), pixels[..., 3])
