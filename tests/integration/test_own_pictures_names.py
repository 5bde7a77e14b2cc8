"""What examples/own_pictures makes of names, texts and images that a newcomer has, and what the
commands after it say to that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from own_pictures.__main__ import describe, main
from own_pictures.subjects import subject_of
from PIL import Image

from megatron_kosmosg.construction.annotations import Annotations
from megatron_kosmosg.construction.entity_step import annotated_entities
from megatron_kosmosg.construction.shard_plan import make_build_plan
from megatron_kosmosg.data.kinds.record import Record
from megatron_kosmosg.data.scripts import find_words
from megatron_kosmosg.inference.prompt_records import read_records
from megatron_kosmosg.preprocess.options import Options
from tests.support.data_helpers import noise_image

HINDI, THAI, TEAPOT = "लाल केतली", "แมวน้ำ", "红茶壶"
PERSIAN = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
"""With a zero-width non-joiner inside of the word."""


def photo(path: Path, content: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(noise_image(1) if content is None else content)
    return path


def run(folder: Path) -> tuple[int, Path]:
    out = folder.parent / "out"
    return main(["--pictures", str(folder), "--output", str(out)]), out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "name",
    [
        *("P1010001.JPG", "p1010001.jpg", "GOPR0001.JPG", "DJI_0001.JPG", "DSC00001.JPG"),
        *("Screenshot_2024.png", "Screenshot (2).png", "WhatsApp Image (2).jpeg"),
        *("WhatsApp Image 2024-01-01 at 12.00.00.jpg", "IMG-20240101-WA0001.jpg"),
        *("PXL_20240101_1234.MP.jpg", "Bildschirmfoto 2024-01-01 um 12.00.00.png"),
        *("IMG_1234_edited.jpg", "IMG_1234 (1).jpg", "FB_IMG_1699999999999.jpg", "20240101.jpg"),
        *("3F2504E0-4F89-11D3-9A0C-0305E82C3301.jpg", "9b74c9897bac770ffc029102a200c5de.jpg"),
        *("DCIM/100CANON/IMG_0001.JPG", "2024/P1010001.JPG", "image.jpg"),
    ],
)
def test_names_of_machines_say_nothing(name):
    assert subject_of(Path(name)) == ""


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("my_dog_1.jpg", "my dog"),
        ("teapot_0001.jpg", "teapot"),
        ("my_dog_2024-01-05.jpg", "my dog"),
        ("photo of my dog.jpg", "photo of my dog"),
        ("camera/1.jpg", "camera"),
        ("100CANON/red_teapot_1.jpg", "red teapot"),
        ("Ka\u0308tzchen/1.jpg", "K\u00e4tzchen"),
        (f"{HINDI}/1.jpg", HINDI),
        (f"{THAI}_2.jpg", THAI),
        ("\u2764\ufe0f dog/1.jpg", "dog"),
        (f"{PERSIAN}/1.jpg", PERSIAN),
    ],
)
def test_names_of_people_keep_their_letters(name, subject):
    assert subject_of(Path(name)) == subject


def test_generate_takes_the_prompts_of_any_script(tmp_path):
    """It refused them all for one "Kätzchen-0", after the trainings."""
    names = ("Ka\u0308tzchen", TEAPOT, HINDI, THAI, "Dog", "dog", "x" * 200, "cat²")
    folder = tmp_path / "photos"
    for name in names:
        photo(folder / name / "1.jpg")
    code, out = run(folder)
    assert code == 0
    records = read_records(out / "prompts.jsonl", image_root=folder)
    assert len(records) == 3 * len(names)
    ids = [str(record.id) for record in records]
    assert {"K\u00e4tzchen-0", f"{TEAPOT}-0", "लाल_केतली-0", f"{THAI}-2", "Dog-0"} <= set(ids)
    assert len([each for each in ids if each.startswith("subject_")]) == 6
    for name in ids:
        (tmp_path / f"{name}-0.png").touch()


def test_prompts_show_the_first_image_that_can_be_read(tmp_path, capsys):
    folder = tmp_path / "photos"
    Image.new("CMYK", (8, 8)).save(photo(folder / "dog" / "1.jpg"), "JPEG")
    photo(folder / "dog" / "2.jpg", noise_image(1)[:60])
    photo(folder / "dog" / "3.jpg", b"")
    photo(folder / "dog" / "4.jpg")
    frames = [Image.new("L", (8, 8), level) for level in (0, 90)]
    frames[0].save(photo(folder / "cat" / "1.gif"), save_all=True, append_images=frames[1:])
    code, out = run(folder)
    said = capsys.readouterr().err
    assert code == 0 and "1.jpg cannot be decoded as an image: the image is CMYK" in said
    assert "no picture of cat can be read" in said
    shown = {image for record in lines(out / "prompts.jsonl") for image in record["images"]}
    assert shown == {str(folder / "dog" / "4.jpg")}
    (folder / "dog" / "4.jpg").unlink()
    code, _ = run(folder)
    assert code == 2 and "none of the 4 pictures can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "caption", "named"),
    [
        (b"", "a photo of dog", "dog"),
        (b"\xef\xbb\xbfa dog", "a dog", "dog"),
        (b"hotdog and a dog", "hotdog and a dog", "dog"),
        (b"Dog at home", "Dog at home", "Dog"),
        (b"at home", "dog, at home", "dog"),
        (b"hotdogs", "dog, hotdogs", "dog"),
    ],
)
def test_texts_name_the_subject_where_it_stands_as_a_word(tmp_path, text, caption, named):
    photo(tmp_path / "photos" / "dog" / "1.jpg")
    (tmp_path / "photos" / "dog" / "1.txt").write_bytes(text)
    (found,) = describe(tmp_path / "photos")
    assert found.caption == caption
    assert caption[slice(*found.span)] == named and caption[: found.span[0]] != "hot"
    run(tmp_path / "photos")
    (annotation,) = lines(tmp_path / "out" / "annotations.jsonl")
    entities, left_out = annotated_entities(annotation["caption"], annotation["entities"])
    assert [entity["text"] for entity in entities] == [named] and not left_out


def test_words_with_marks_are_found_whole():
    assert find_words(HINDI, f"यह {HINDI} है").span() == (3, 3 + len(HINDI))
    assert find_words("हि", "हिन्दी") is None and find_words("dog", "do\u0308g dog").start() == 5


def test_a_text_that_is_not_utf8_is_named(tmp_path, capsys):
    photo(tmp_path / "photos" / "dog" / "1.jpg")
    (tmp_path / "photos" / "dog" / "1.txt").write_bytes("ein Kätzchen".encode("latin-1"))
    code, out = run(tmp_path / "photos")
    error = capsys.readouterr().err
    assert code == 2 and not out.exists() and error.count("\n") == 1
    assert error.startswith(f"error: {tmp_path / 'photos' / 'dog' / '1.txt'} is not UTF-8")


def test_a_file_as_output_is_one_line(tmp_path, capsys):
    photo(tmp_path / "photos" / "dog" / "1.jpg")
    for output in (photo(tmp_path / "out"), tmp_path / "out" / "below"):
        code = main(["--pictures", str(tmp_path / "photos"), "--output", str(output)])
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert str(output) in error


def test_help_explains_each_option(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert "a folder for each subject" in told and "for annotations.jsonl" in told


def test_images_that_differ_in_their_ending_alone_are_both_kept(tmp_path):
    folder = tmp_path / "photos"
    for name in ("1.jpg", "1.png", "2.png"):
        photo(folder / "dog" / name)
    code, out = run(folder)
    keys = [record["key"] for record in lines(out / "captions.jsonl")]
    assert code == 0 and keys == ["dog/1", "dog/1.png", "dog/2"]
    plan = make_build_plan(tmp_path / "built", [str(folder)], 4, None, Options())
    planned = list(plan.images(0))
    assert [each.key for each in planned] == keys
    assert all(isinstance(each.record, Record) for each in planned)
    annotations = Annotations(out / "annotations.jsonl")
    assert annotations.find("dog/1.png") == annotations.find("dog/1")
