"""Prompt records: two ways to write them, defaults, and an error that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_kosmosg.inference.prompt_records import (
    PromptError,
    open_image_file,
    parse_record,
    read_records,
    split_prompt,
)


def write(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_placeholders_and_content_give_the_same_parts(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "a <image>and <image> in snow", "images": ["x/cat.png", "dog.png"]},
        "",
        {
            "id": "b",
            "content": [
                {"text": "a"},
                {"image": "x/cat.png"},
                {"text": "and"},
                {"image": "dog.png"},
                {"text": "in snow"},
            ],
            "seed": 3,
            "steps": 5,
            "guidance": 2,
            "negative_prompt": "blue",
            "control_image": "pose.png",
            "height": None,
        },
    )
    first, second = read_records(path)
    expected = ("a", tmp_path / "x/cat.png", "and", tmp_path / "dog.png", "in snow")
    assert first.content == second.content == expected
    assert (first.id, second.id) == ("000001", "b")
    assert first.text == "a <image> and <image> in snow"
    assert first.options.seed is None and first.options.height is None
    options = second.options
    assert (options.seed, options.steps, options.guidance) == (3, 5, 2)
    assert (options.negative_prompt, options.height) == ("blue", None)
    assert options.control_image == tmp_path / "pose.png"


def test_the_placeholder_in_content_is_only_words(tmp_path):
    record = parse_record({"content": [{"text": "write <image>"}]}, tmp_path, "x", "1")
    assert record.content == ("write <image>",) and record.images == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "a record is a JSON object"),
        ({"prompt": "a", "guidence": 2}, "did you mean 'guidance'"),
        ({"prompt": "a", "zzz": 2}, "unknown field 'zzz'; known: id, prompt"),
        ({}, "either prompt .* or content"),
        ({"prompt": "a", "content": [{"text": "a"}]}, "either prompt .* or content"),
        ({"prompt": 5}, "prompt is a string"),
        ({"prompt": "a", "images": "cat.png"}, "images is a list"),
        ({"prompt": "a <image>", "images": []}, "1 <image> in the prompt but 0"),
        ({"prompt": "a", "images": ["cat.png"]}, "0 <image> in the prompt but 1"),
        ({"content": []}, "content is a list"),
        ({"content": ["a"]}, "a content entry is"),
        ({"content": [{"text": "a", "image": "b"}]}, "a content entry is"),
        ({"content": [{"image": 3}]}, "image is a string"),
        ({"content": [{"text": "a"}], "images": []}, "leave out images"),
        ({"prompt": "a", "id": "../x"}, "cannot name a file"),
        ({"prompt": "a", "id": 5}, "cannot name a file"),
        ({"prompt": "a", "steps": 0}, "steps is a whole number from 1"),
        ({"prompt": "a", "seed": -1}, "seed is a whole number from 0"),
        ({"prompt": "a", "num_images": True}, "num_images is a whole number"),
        ({"prompt": "a", "width": 64.0}, "width is a whole number"),
        ({"prompt": "a", "guidance": "high"}, "guidance is a number"),
        ({"prompt": "a", "negative_prompt": 1}, "negative_prompt is a string"),
    ],
)
def test_a_bad_record_is_named_with_what_is_needed(tmp_path, record, message):
    path = write(tmp_path, {"prompt": "fine"}, record)
    with pytest.raises(PromptError, match=f"prompts.jsonl:2: .*{message}"):
        read_records(path)


def test_bad_files(tmp_path):
    with pytest.raises(PromptError, match="no file"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(PromptError, match="no record"):
        read_records(write(tmp_path, ""))
    with pytest.raises(PromptError, match=":1: not JSON"):
        read_records(write(tmp_path, "{"))
    with pytest.raises(PromptError, match="id 'A' is that of line 1"):
        read_records(write(tmp_path, {"id": "a", "prompt": ""}, {"id": "A", "prompt": ""}))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="cannot be read"):
        read_records(tmp_path / "binary")


def test_an_empty_prompt_has_no_parts():
    assert split_prompt("  ", [], "x") == ()


def test_images_are_opened_upright_or_named(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored image lies on its side
    Image.new("L", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    turned = open_image_file(tmp_path / "turned.jpg")
    assert (turned.mode, turned.size) == ("RGB", (4, 6))
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 90).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(PromptError, match=f"{name} cannot be decoded"):
            open_image_file(tmp_path / name)
    with pytest.raises(PromptError, match="no image .*none.png"):
        open_image_file(tmp_path / "none.png")


@pytest.mark.parametrize("name", ["Kätzchen-0", "红茶壶-1", "हिन्दी_किताब-2", "แมวน้ำ", "7.a_b"])
def test_ids_are_letters_of_any_script(tmp_path, name):
    """The message allowed letters and the rule those of ASCII alone."""
    (record,) = read_records(write(tmp_path, {"id": name, "prompt": ""}))
    assert record.id == name
    (tmp_path / f"{record.id}-0.png").touch()


def test_an_id_of_letters_in_parts_is_that_of_the_whole_letters(tmp_path):
    """macOS takes both names for the same file."""
    apart = {"id": "Ka\u0308tzchen", "prompt": ""}
    (record,) = read_records(write(tmp_path, apart))
    assert record.id == "K\u00e4tzchen"
    with pytest.raises(PromptError, match="is that of line 1"):
        read_records(write(tmp_path, apart, {"id": "K\u00c4TZCHEN", "prompt": ""}))


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a\u202eb", "a\u200bb", "\u0308a"])
def test_ids_that_files_cannot_be_called_by(tmp_path, name):
    with pytest.raises(PromptError, match="cannot name a file; use letters and digits, after"):
        read_records(write(tmp_path, {"id": name, "prompt": ""}))


def test_ids_are_as_long_as_file_systems_allow(tmp_path):
    read_records(write(tmp_path, {"id": "a" * 151, "prompt": ""}))
    with pytest.raises(PromptError, match="151 bytes"):
        read_records(write(tmp_path, {"id": "壶" * 51, "prompt": ""}))
