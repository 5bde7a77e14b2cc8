"""Data construction without models: entities, regions, sources, shares."""

from __future__ import annotations

import io
import json
from collections import deque

import numpy as np
import pytest
from PIL import Image

from megatron_kosmosg.construction.annotations import Annotations
from megatron_kosmosg.construction.entity_step import (
    ABSENT,
    LONG,
    UNFIT,
    annotated_entities,
    named_entities,
    parse_answer,
)
from megatron_kosmosg.construction.noun_phrases import noun_phrases
from megatron_kosmosg.construction.regions import (
    dilated,
    entity_region,
    largest_component,
    square_around,
)
from megatron_kosmosg.construction.shard_plan import make_build_plan
from megatron_kosmosg.construction.square_images import SquareImages
from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.toy.toy_captions import caption as toy_caption
from megatron_kosmosg.toy.world import sample_scene
from tests.support.data_helpers import encode_image, noise_image, write_jsonl


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a dog and a cat sitting on a red sofa", ["dog", "cat", "red sofa"]),
        ("two men riding horses in front of a building", ["men", "horses", "building"]),
        ("A photo of the Eiffel Tower at night.", ["Eiffel Tower", "night"]),
        ("a close up of a cell phone, a mouse and 3 pens", ["cell phone", "mouse", "pens"]),
        ("it is there", []),
    ],
)
def test_noun_phrases(caption, phrases):
    assert noun_phrases(caption) == phrases


def test_noun_phrases_of_toy_captions_name_every_shape():
    for seed in range(50):
        scene = sample_scene(seed, 2, False)
        words = toy_caption(scene, "mix", seed)
        entities, _ = named_entities(words, noun_phrases(words))
        shapes = [entity.shape for entity in scene.entities]
        named = [entity["text"].split()[-1] for entity in entities]
        assert set(shapes) <= set(named), words


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ('["dog", "red sofa"]', ["dog", "red sofa"]),
        (' Sure: ["a dog", "The cat."]\n["boat"]', ["dog", "cat"]),
        ("a dog, cat, lamp.\nSentence: more", ["dog", "cat", "lamp"]),
        ("猫，狗、沙发", ["猫", "狗", "沙发"]),
        ("[]", []),
    ],
)
def test_answers_of_language_models(answer, names):
    assert parse_answer(answer) == names


@pytest.mark.parametrize("answer", ["", '["dog', '[{"name": "dog"}]', "# dogs", "[1]"])
def test_answers_that_are_no_lists_are_rejected(answer):
    with pytest.raises(Rejected, match="answer is not a list"):
        parse_answer(answer)


def test_named_entities_stand_in_the_caption():
    caption = "A big dog chases the dog house and a red ball"
    names = ["Ball", "dog", "dog house", "cat", "red", "ball", "a b c d e f g"]
    entities, left_out = named_entities(caption, names)
    assert entities == [
        {"text": "dog house", "span": [21, 30]},
        {"text": "ball", "span": [41, 45]},
    ]
    assert sorted(left_out) == sorted([LONG, ABSENT, UNFIT, UNFIT])


@pytest.mark.parametrize(
    ("caption", "names"),
    [
        ("一只猫，坐在红色沙发上，旁边有一只狗。", ["猫", "沙发", "狗"]),
        ("ソファの上に猫がいて、犬もいます。", ["ソファ", "猫", "犬"]),
        ("แมวนั่งบนโซฟา", ["แมว", "โซฟา"]),
        ("一件T恤和cat", ["T恤", "cat"]),
        ("고양이 와 개", ["고양이", "개"]),
    ],
)
def test_names_are_found_in_scripts_without_spaces(caption, names):
    entities, left_out = named_entities(caption, names)
    assert [entity["text"] for entity in entities] == names and left_out == []
    assert named_entities("a catalogue", ["cat"]) == ([], [ABSENT])


def test_given_spans_are_checked():
    caption = "a dog and a dog"
    second = {"text": "dog", "span": [12, 15], "mask": "m.png"}
    assert annotated_entities(caption, [second]) == ([{"text": "dog", "span": [12, 15]}], [])
    assert annotated_entities(caption, ["dog"])[0] == [{"text": "dog", "span": [2, 5]}]
    with pytest.raises(Rejected, match="does not hold its text"):
        annotated_entities(caption, [{"text": "cat", "span": [2, 5]}])
    with pytest.raises(Rejected, match="neither text nor an object"):
        annotated_entities(caption, [7])


def components(region: np.ndarray) -> list[set[tuple[int, int]]]:
    """Parts of a region by a walk over its pixels."""
    left = set(zip(*map(np.ndarray.tolist, np.nonzero(region)), strict=True))
    parts = []
    while left:
        part, waiting = set(), deque([min(left)])
        while waiting:
            y, x = waiting.popleft()
            if (y, x) in left:
                left.remove((y, x))
                part.add((y, x))
                waiting.extend([(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)])
        parts.append(part)
    return parts


@pytest.mark.parametrize("density", [0.3, 0.5, 0.6, 0.9])
def test_largest_component_as_a_walk_finds_it(density):
    rng = np.random.default_rng(int(100 * density))
    for _ in range(20):
        region = rng.random((17, 23)) < density
        sizes = sorted(map(len, components(region)))
        found = largest_component(region)
        assert not (found & ~region).any()
        (part,) = components(found)
        assert len(part) == sizes[-1] and part in components(region)


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_dilation_as_a_loop_does_it(window):
    region = np.random.default_rng(window).random((12, 15)) < 0.05
    before, after = window // 2, window - window // 2 - 1
    expected = np.zeros_like(region)
    for y, x in np.ndindex(region.shape):
        near = region[max(0, y - before) : y + after + 1, max(0, x - before) : x + after + 1]
        expected[y, x] = near.any()
    assert (dilated(region, window) == expected).all()


def test_region_and_square_of_a_probability_map():
    probability = np.zeros((200, 200), np.float32)
    probability[150:190, 160:195] = 0.31
    probability[10:20, 10:20] = 0.99
    probability[100:140, 20:120] = 0.29
    region = entity_region(probability, 0.3)
    assert region[150:190, 160:195].all() and not region[:145].any()
    assert region.sum() == 41 * 36, "dilated by a window of 200 // 100"
    left, top, side = square_around(region)
    assert side == 41 and 0 <= left <= 160 and left + side >= 195 and top + side <= 200
    with pytest.raises(Rejected, match="mask is empty"):
        entity_region(probability, 0.995)


@pytest.mark.parametrize(
    ("box", "square"),
    [
        ((0, 10, 4, 30), (0, 10, 20)),
        ((90, 0, 100, 50), (50, 0, 50)),
        ((40, 40, 41, 41), (40, 40, 1)),
    ],
)
def test_squares_are_shifted_inside(box, square):
    region = np.zeros((100, 100), bool)
    region[box[1] : box[3], box[0] : box[2]] = True
    assert square_around(region) == square


def test_masks_take_the_turns_of_their_image(tmp_path):
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[1, 4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", exif=exif)
    record = Record("x", {"image": out.getvalue(), "rotation": 90.0}, tmp_path)
    images = SquareImages(Options())
    image = np.asarray(images.square(record))
    mask = images.mask(record, encode_image(pixels[..., 0]))
    assert image.shape == (8, 8, 3) and (image[..., 0] == mask).all()
    # Both quarter turns cancel: what is left is the centre of the stored image.
    assert (mask == pixels[:, 2:10, 0]).all() and mask.any()
    with pytest.raises(Rejected, match="differ in size"):
        images.mask(record, encode_image(pixels[:4, :4, 0]))


def test_open_images_list_names_images_and_turns(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0a.jpg").write_bytes(noise_image(1, image_format="JPEG"))
    (tmp_path / "image_ids_and_rotation.csv").write_text(
        'ImageID,Subset,OriginalURL,Title,Rotation\n0a,train,http://x,"a, b",270\n'
        "0b,train,http://y,c,\n0c,train,http://z\n0d,train,http://z,d,nan\n"
    )
    listed = str(tmp_path / "image_ids_and_rotation.csv")
    plan = make_build_plan(tmp_path / "out", [listed], 2, None, Options())
    found = [p for shard in range(plan.num_shards) for p in plan.images(shard)]
    keys = [p.key for p in found]
    assert keys[:2] == ["0a", "0b"] and keys[3] == "0d" and len(keys) == 4
    assert isinstance(found[2].record, Rejected) and "CSV columns" in found[2].record.reason
    turns = [found[i].record.fields["rotation"] for i in (0, 1, 3)]
    assert turns == [270.0, 0.0, 0.0]
    assert SquareImages(Options()).square(found[0].record).size == (12, 12)
    with pytest.raises(Rejected, match="image cannot be read"):
        SquareImages(Options()).square(found[1].record)


def test_a_plan_is_kept_and_others_are_refused(tmp_path):
    images = tmp_path / "pictures" / "a"
    images.mkdir(parents=True)
    for name in ("1.jpg", "2.png", "2.jpg"):
        (images / name).write_bytes(noise_image(1))
    (images / "notes.txt").write_text("no picture")
    inputs = [str(tmp_path / "pictures")]
    plan = make_build_plan(tmp_path / "out", inputs, 4, None, Options())
    assert [p.key for p in plan.images(0)] == ["a/1", "a/2", "a/2.png"]
    assert not [p for p in plan.images(0) if isinstance(p.record, Rejected)]
    (images / "3.jpg").write_bytes(noise_image(1))
    again = make_build_plan(tmp_path / "out", inputs, 4, None, Options())
    assert len(list(again.images(0))) == 3, "a picture that came later is not in the plan"
    with pytest.raises(ValueError, match="shard_size: 4 -> 5"):
        make_build_plan(tmp_path / "out", inputs, 5, None, Options())
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        make_build_plan(tmp_path / "out2", [str(tmp_path / "none")], 4, None, Options())


def test_annotations_are_found_by_key_and_broken_lines_named(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"key": "d/1.jpg", "caption": "ä dog"},
            {"image_id": "2", "caption": "b"},
            {"key": "2", "caption": "c"},
        ],
    )
    annotations = Annotations(path)
    assert annotations.find("d/1")["caption"] == "ä dog"
    assert annotations.find("2")["caption"] == "b"
    with pytest.raises(Rejected, match="not in a.jsonl"):
        annotations.find("3")
    path.write_text(json.dumps({"key": "1"}) + "\n{broken\n")
    with pytest.raises(ValueError, match="a.jsonl:2 is not JSON"):
        Annotations(path)
    path.write_text('{"name": "1"}\n')
    with pytest.raises(ValueError, match="key and image_id"):
        Annotations(path)
