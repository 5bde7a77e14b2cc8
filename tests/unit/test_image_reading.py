"""One way to read an image: every format by every reader, masks in every form, older datasets."""

from __future__ import annotations

import gc
import io

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_kosmosg.data.bad_images import TooManyBadImages
from megatron_kosmosg.data.image_headers import dali_form
from megatron_kosmosg.data.image_reading import fitted_mask, read_image, stored_form
from megatron_kosmosg.data.image_types import ImageTransform, UnreadableImage
from megatron_kosmosg.data.images import ImageDecoder, PillowBackend
from megatron_kosmosg.data.samples import EntityImage
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.streams import instruct_stream
from megatron_kosmosg.hf.pipeline_kosmosg import resize_and_crop
from tests.support import image_readers
from tests.support.data_helpers import (
    build_dataset,
    encode_image,
    overwrite_image,
    run_config,
    write_clip_tokenizer,
)
from tests.support.image_files import ORIENTATION, STORED_AS, image_files


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> image_readers.Datasets:
    return image_readers.Datasets(tmp_path_factory.mktemp("formats"))


@pytest.mark.skipif(len(image_readers.BACKENDS) == 1, reason="nvidia-dali is not installed")
def test_the_table_of_the_docs_is_what_every_reader_does(datasets):
    page = image_readers.PAGE.read_text(encoding="utf-8")
    written = page.partition(image_readers.BEGIN)[2].partition(image_readers.END)[0].strip()
    assert written.splitlines() == image_readers.table(datasets).splitlines()
    # Only who is given an opened image may take what others refuse.
    taken = [line for line in written.splitlines() if "| taken |" in line]
    assert [line.split(" | ")[0] for line in taken] == ["| PNG, last 20 bytes cut"]
    assert "wrong" not in written


def test_what_is_stored_has_no_problems(datasets):
    refused = {name for name, file in image_files().items() if file.refused is not None}
    assert datasets.problems == []
    assert set(datasets.stored) == set(image_files()) - refused


@pytest.mark.parametrize("name", image_files())
def test_the_specification_is_what_people_see(name):
    file = image_files()[name]
    if file.refused is not None:
        with pytest.raises(UnreadableImage, match=file.refused):
            read_image(file.data)
        return
    found, seen = (np.asarray(each, np.float32) for each in (read_image(file.data), file.seen))
    assert found.shape == seen.shape
    # Two ways to mix with white round differently.
    assert np.abs(found - seen).mean() <= file.tolerance + 0.1


def test_what_is_stored_of_other_formats_is_decoded_by_dali(datasets):
    turned = {"TIFF, EXIF 6"}
    clear = {name for name in datasets.stored if "alpha" in name or "RGBA" in name}
    clear |= {name for name in datasets.stored if "transparent" in name}
    for name in set(datasets.stored) - clear - turned:
        if image_readers.stored_as(name, datasets) == "PNG":
            assert dali_form(datasets.stored[name]) is datasets.stored[name], name


def test_dali_is_given_three_formats_only():
    given = {name: dali_form(file.data) for name, file in image_files().items()}
    fed = {name for name, data in given.items() if data is not None}
    assert {name.split(",")[0].split()[0] for name in fed} == {"JPEG", "PNG", "WebP"}
    for name in ("JPEG", "JPEG, progressive", "JPEG, grey", "PNG", "PNG, palette", "WebP"):
        assert given[name] is image_files()[name].data
    for name in fed:
        assert image_files()[name].refused is None
        assert np.array_equal(read_image(given[name]), read_image(image_files()[name].data))


def with_adobe_note(jpeg: bytes, transform: int) -> bytes:
    note = b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0" + bytes([transform])
    return jpeg[:2] + note + jpeg[2:]


def test_a_jpeg_that_may_be_stored_as_rgb_is_not_given_to_dali():
    """nvImageCodec, which decodes on a GPU, takes every three channels for YCbCr."""
    files = image_files()
    assert dali_form(files["JPEG, stored as RGB"].data) is None
    assert dali_form(with_adobe_note(files["JPEG"].data, 0)) is None
    for usual in (
        with_adobe_note(files["JPEG"].data, 1),
        with_adobe_note(files["JPEG, grey"].data, 0),
    ):
        assert dali_form(usual) is usual


@pytest.mark.parametrize("name", ["JPEG, EXIF 6", "PNG, palette", "WebP"])
def test_the_start_of_a_file_is_not_given_to_dali(name):
    data = image_files()[name].data
    assert all(dali_form(data[:length]) is None for length in range(1, len(data), 7))


INSIDE = np.zeros((30, 40), np.uint8)
INSIDE[4:20, 6:18] = 1
MASK = INSIDE * 255


def paletted(colours: list[int]) -> Image.Image:
    image = Image.fromarray(INSIDE, "P")
    image.putpalette(colours)
    return image


def with_alpha(opacity: int) -> Image.Image:
    alpha = np.full_like(MASK, 255)
    alpha[0] = opacity
    return Image.fromarray(np.dstack([MASK, alpha]))


SURE_MASKS = {
    "levels": Image.fromarray(MASK),
    "0 and 1": Image.fromarray(INSIDE),
    "0 and a class": Image.fromarray(INSIDE * 38),
    "0 and 254": Image.fromarray(INSIDE * 254),
    "1 bit": Image.fromarray(MASK).convert("1"),
    "three channels": Image.fromarray(MASK).convert("RGB"),
    "four channels": Image.fromarray(MASK).convert("RGBA"),
    "opaque alpha": with_alpha(255),
    "16 bits": Image.fromarray(MASK.astype(np.uint16) * 257),
    "labels in 16 bits": Image.fromarray(INSIDE.astype(np.uint16)),
    "grey palette": paletted([0, 0, 0, 255, 255, 255]),
    "one colour on black": paletted([0, 0, 0, 128, 0, 0]),
}
LABELS = INSIDE.copy()
LABELS[25:] = 2
VOID = INSIDE * 15
VOID[3, 6:18] = 255
UNSURE_MASKS = {
    "is empty": Image.new("L", (40, 30)),
    "holds labels, not levels": Image.fromarray(LABELS),
    r"holds labels, not levels from 0 to 255: values 0, 15, 255": Image.fromarray(VOID),
    "has colours": Image.fromarray(np.dstack([MASK, MASK, 255 - MASK])),
    "has a palette of colours": paletted([200, 0, 0, 0, 0, 200]),
    "has transparency of its own": with_alpha(0),
    "and its image differ in size": Image.fromarray(MASK[:20]),
}


@pytest.mark.parametrize("form", SURE_MASKS)
def test_a_mask_of_a_certain_meaning_is_converted(form):
    mask = fitted_mask(encode_image(SURE_MASKS[form]), (40, 30), 1)
    assert mask.mode == "L" and np.array_equal(mask, MASK)


@pytest.mark.parametrize("reason", UNSURE_MASKS)
def test_another_mask_is_refused_by_name(reason):
    with pytest.raises(UnreadableImage, match=f"the mask {reason}"):
        fitted_mask(encode_image(UNSURE_MASKS[reason]), (40, 30), 1)


def test_soft_masks_stay_as_they_are():
    soft = Image.fromarray(MASK).resize((80, 60), Image.Resampling.BICUBIC)
    assert np.array_equal(fitted_mask(encode_image(soft), (80, 60), 1), soft)
    whole = Image.new("L", (40, 30), 255)
    assert np.array_equal(fitted_mask(encode_image(whole), (40, 30), 1), whole)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_a_mask_follows_its_image(orientation, image_format):
    pixels = np.full((30, 40, 3), 128, np.uint8)
    pixels[INSIDE > 0] = (200, 0, 0)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(pixels).transpose(STORED_AS[orientation])
    photo = encode_image(stored, image_format, exif=exif, lossless=True)
    kept = stored_form(photo, Image.open(io.BytesIO(photo)))
    mask = Image.fromarray(MASK).transpose(STORED_AS[orientation])
    masks = {"stored": encode_image(mask), "with its note": encode_image(mask, exif=exif)}
    masks["TIFF with its note"] = encode_image(mask, "TIFF", exif=exif)
    exif[ORIENTATION] = 1
    masks["upright by its note"] = encode_image(MASK, exif=exif)
    if orientation in (5, 6, 7, 8):
        masks["upright by its size"] = encode_image(MASK)
    pixels[INSIDE == 0] = 255
    for name, data in masks.items():
        for image in (photo, kept):
            assert np.array_equal(read_image(EntityImage(image, data)), pixels), name


SQUARE = ImageTransform(24, "bicubic", (0.0,) * 3, (1.0,) * 3)


def test_a_strip_costs_its_middle(monkeypatch):
    sizes, resize = [], Image.Image.resize

    def watch(self, size, *arguments, **more):
        sizes.append(size)
        return resize(self, size, *arguments, **more)

    monkeypatch.setattr(Image.Image, "resize", watch)
    rng = np.random.default_rng(0)
    for shape in ((30, 9000, 3), (9000, 30, 3)):
        strip = encode_image(rng.integers(0, 256, shape, dtype=np.uint8))
        found = PillowBackend().decode([strip], SQUARE)[0].numpy().astype(np.float32)
        opened = Image.open(io.BytesIO(strip))
        shown = np.asarray(resize_and_crop(opened, 24, "image 1"), np.float32)
        assert max(max(size) for size in sizes) == 24
        whole = resize(opened, (7200, 24) if shape[0] == 30 else (24, 7200), Image.BICUBIC)
        box = (3588, 0, 3612, 24) if shape[0] == 30 else (0, 3588, 24, 3612)
        expected = np.asarray(whole.crop(box), np.float32)
        assert np.abs(found.transpose(1, 2, 0) - expected).max() <= 1.01
        assert np.abs(shown - expected).max() <= 1.01


def test_parts_of_a_sample_outlive_their_store(tmp_path):
    prefix = build_dataset(tmp_path, "edit", 3)
    store = SampleStore(prefix)
    expected, first = store[1].images(), store[0].images()
    part = store[1].parts[2]
    del store
    gc.collect()
    assert part.tobytes() == expected[0]
    assert SampleStore(prefix)[0].images() == first


def test_a_dataset_without_a_decodable_prompt_image_ends_by_name(tmp_path):
    prefix = build_dataset(tmp_path, "edit", 4)
    for sample in range(4):
        overwrite_image(prefix, sample, 0)
    write_clip_tokenizer(tmp_path)
    stream = instruct_stream(run_config(tmp_path, "instruct", {"broken": (prefix, 1.0)}), "train")
    sample = stream[0]
    with pytest.raises(TooManyBadImages, match="dataset broken: .* is not a known image format"):
        stream.collate([sample], stream.pad_to([sample], [0]))


class Failing:
    """A library that fails in its words, but for the small images that tell whether it works."""

    def decode(self, images, transform):
        if len(images[0]) > 1500:
            raise RuntimeError(DALI_SAYS)
        return PillowBackend().decode(images, transform)


DALI_SAYS = """Critical error in pipeline:
Error in CPU operator `nvidia.dali.fn.decoders.image`,
which was used in the pipeline definition with the following traceback:

  File "images_dali.py", line 99, in _build
    image = fn.decoders.image(encoded, device=device)

encountered:

Error when decoding sample #0:
[codec.cc:12] Image is incomplete
Current pipeline object is no longer valid."""


def test_what_pillow_reads_is_read_and_the_library_is_quoted_whole(caplog):
    decoder = ImageDecoder("pillow")
    decoder._backend = Failing()
    images = [image_files()["JPEG"].data, image_files()["JPEG, cut"].data]
    with caplog.at_level("WARNING"):
        pixels, bad = decoder.try_decode([*images, images[0]], SQUARE)
    (line,) = caplog.messages
    assert line.endswith(
        "Critical error in pipeline: Error in CPU operator `nvidia.dali.fn.decoders.image`, "
        "Error when decoding sample #0: [codec.cc:12] Image is incomplete"
    )
    assert [error.index for error in bad] == [1]
    assert bad[0].reason.startswith("the image is truncated: ")
    assert torch.equal(pixels[0], decoder.decode(images[:1], SQUARE)[0])
