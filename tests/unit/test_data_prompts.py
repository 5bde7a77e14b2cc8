"""Prompt assembly token by token, per kind."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.kinds.caption import MAX_TOKENS, CaptionPrompts
from megatron_kosmosg.data.kinds.compositional import CompositionalPrompts
from megatron_kosmosg.data.kinds.edit import EditPrompts
from megatron_kosmosg.data.kinds.entity_placement import order_entities
from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.data.random_keys import SampleKey
from megatron_kosmosg.data.samples import EntityImage
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.stored_sample import IMAGE, JSON, TOKENS, RawSample
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.preprocess.convert import RecordConversion
from tests.support.data_helpers import encode_image, noise_image, write_tokenizer

QUERIES = 3
DRAWS = SampleKey(0, "instruct/train", 0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("prompts")))


@pytest.fixture(scope="module")
def layout(tokenizer):
    return SequenceFormat(tokenizer, QUERIES)


def stored(kind: str, fields: dict, tokenizer: Tokenizer, tmp_path) -> RawSample:
    """What the store gives back for a record."""
    parts = KINDS[kind].convert(Record("f:1", fields, tmp_path), RecordConversion(tokenizer)).parts
    assert parts[0].mode == JSON
    return RawSample.of_bytes((np.frombuffer(p.data, np.uint8), p.mode) for p in parts)


def spell(tokenizer: Tokenizer, *runs: str | None) -> list[int]:
    """<s>, then each run of text tokenised alone, None an image."""
    ids = [tokenizer.bos_id]
    for run in runs:
        if run is None:
            ids += [tokenizer.image_id] * (QUERIES + 1) + [tokenizer.end_image_id]
        else:
            ids += tokenizer.encode(run)
    return ids


def compositional_fields(caption: str, *entities: tuple[str, bool], start: int = 0) -> dict:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    listed = []
    for i, (text, has_mask) in enumerate(entities):
        at = caption.index(text, start)
        listed.append(
            {
                "text": text,
                "span": [at, at + len(text)],
                "image": noise_image(i, 8, 8),
                "mask": encode_image(mask) if has_mask else None,
            }
        )
    return {"key": "k", "caption": caption, "image": noise_image(99), "entities": listed}


def maker(layout, text_drop=0.0, per="sample", keep=1.0):
    return CompositionalPrompts(layout, text_drop, per, keep)


def test_published_example_layout(tokenizer):
    """`<image> in the snow` with 64 queries: the slots are positions 2..65."""
    builder = SequenceBuilder(SequenceFormat(tokenizer, 64)).add_start().add_image(b"x")
    prompt = builder.add_text(tokenizer.encode("in the snow")).prompt()
    image, end = tokenizer.image_id, tokenizer.end_image_id
    tail = tokenizer.encode("in the snow")
    assert prompt.tokens.tolist() == [0, *[image] * 65, end, *tail]
    assert np.flatnonzero(prompt.image_mask).tolist() == list(range(2, 66))
    assert len(prompt.tokens) == 67 + len(tail)


def test_caption_prompt_draws_its_image(layout, tokenizer, tmp_path):
    image = noise_image(1)
    fields = {"key": "k", "caption": "the red circle", "image": image}
    prompt = CaptionPrompts(layout)(stored("caption", fields, tokenizer, tmp_path), DRAWS)
    assert prompt.tokens.tolist() == spell(tokenizer, "the red circle")
    assert prompt.images == [] and prompt.target == image and not prompt.image_mask.any()
    assert CaptionPrompts(layout).length([(TOKENS, MAX_TOKENS + 1), (IMAGE, 9)], DRAWS) is None
    assert CaptionPrompts(layout).length([(TOKENS, MAX_TOKENS), (IMAGE, 9)], DRAWS) == 129


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_edit_prompt_with_and_without_the_caption(layout, tokenizer, tmp_path, drop):
    before, after = noise_image(1), noise_image(2)
    texts = {"caption": "a red circle", "instruction": "make it blue"}
    fields = {"key": "k", "image": before, "target": after} | texts
    prompt = EditPrompts(layout, drop)(stored("edit", fields, tokenizer, tmp_path), DRAWS)
    runs = (None, "make it blue") if drop else ("a red circle", None, "make it blue")
    assert prompt.tokens.tolist() == spell(tokenizer, *runs)
    assert prompt.images == [before] and prompt.target == after


def test_entities_keep_or_lose_their_words(layout, tokenizer, tmp_path):
    caption = "a red circle and a blue square on a green background"
    fields = compositional_fields(caption, ("red circle", True), ("blue square", False))
    raw = stored("compositional", fields, tokenizer, tmp_path)
    kept = maker(layout, 0.0)(raw, DRAWS)
    tail = "on a green background"
    runs = ("a red circle", None, "and a blue square", None, tail)
    assert kept.tokens.tolist() == spell(tokenizer, *runs)
    dropped = maker(layout, 1.0)(raw, DRAWS)
    assert dropped.tokens.tolist() == spell(tokenizer, "a", None, "and a", None, tail)
    assert kept.target == dropped.target == fields["image"]
    assert kept.caption == caption


def test_entity_at_the_start_leaves_no_tokens_before_its_image(layout, tokenizer, tmp_path):
    raw = stored(
        "compositional",
        compositional_fields("dog in the snow", ("dog", False)),
        tokenizer,
        tmp_path,
    )
    prompt = maker(layout, 1.0)(raw, DRAWS)
    assert prompt.tokens.tolist() == spell(tokenizer, None, "in the snow")


def test_background_stays_or_goes_by_coin_and_only_with_a_mask(layout, tokenizer, tmp_path):
    caption = "a red circle and a blue square"
    fields = compositional_fields(caption, ("red circle", True), ("blue square", False))
    raw = stored("compositional", fields, tokenizer, tmp_path)
    first, second = fields["entities"]
    assert maker(layout, keep=1.0)(raw, DRAWS).images == [
        EntityImage(first["image"]),
        EntityImage(second["image"]),
    ]
    assert maker(layout, keep=0.0)(raw, DRAWS).images == [
        EntityImage(first["image"], first["mask"]),
        EntityImage(second["image"]),
    ]


def test_one_coin_per_sample_or_per_entity(layout, tokenizer, tmp_path):
    caption = "a red circle and a blue square"
    fields = compositional_fields(caption, ("red circle", True), ("blue square", True))
    raw = stored("compositional", fields, tokenizer, tmp_path)
    patterns: dict[str, list[tuple[bool, bool]]] = {"sample": [], "entity": []}
    for per, found in patterns.items():
        make = maker(layout, 0.5, per, 0.5)
        for position in range(200):
            tokens = make(raw, SampleKey(0, "instruct/train", position)).tokens.tolist()
            lost_first = tokens[2] == tokenizer.image_id
            lost_second = tokens[-QUERIES - 3] == tokenizer.encode("a")[0]
            found.append((lost_first, lost_second))
    assert set(patterns["sample"]) == {(False, False), (True, True)}
    assert len(set(patterns["entity"])) == 4
    for found in patterns.values():
        assert abs(np.mean([first for first, _ in found]) - 0.5) < 0.12


def test_backgrounds_are_drawn_per_entity_and_apart_from_the_words(layout, tokenizer, tmp_path):
    caption = "a red circle and a blue square"
    fields = compositional_fields(caption, ("red circle", True), ("blue square", True))
    raw = stored("compositional", fields, tokenizer, tmp_path)
    make = maker(layout, 0.5, "sample", 0.5)
    seen = set()
    for position in range(100):
        prompt = make(raw, SampleKey(0, "instruct/train", position))
        lost = prompt.tokens[2] == tokenizer.image_id
        seen.add((lost, *(image.mask is None for image in prompt.images)))
    assert len(seen) == 8


def runs(caption: str, *entities: tuple[str, int]) -> list[tuple[str, str]]:
    listed = [{"text": text, "span": [at, at + len(text)]} for text, at in entities]
    placed, tail = order_entities(caption, listed)
    return [(e.with_words, e.without_words) for e in placed] + [(tail, tail)]


def test_entities_are_ordered_extended_and_freed_of_overlaps():
    assert runs("two dogs, one cat", ("cat", 14), ("dog", 4)) == [
        ("two dogs", "two "),
        (", one cat", ", one "),
        ("", ""),
    ]
    # "circle" ends first; "red circle" overlaps it and is left out, as the authors' walk does.
    assert runs("a red circle (dots)", ("red circle", 2), ("dots", 14)) == [
        ("a red circle", "a "),
        (" (dots", " ("),
        (")", ")"),
    ]
    assert runs("a cat's, a man-eater, a “cat”", ("cat", 2), ("man", 11)) == [
        ("a cat's", "a "),
        (", a man-eater", ", a "),
        (", a “cat”", ", a “cat”"),
    ]
    assert runs("red dog", ("red dog", 0), ("dog", 4)) == [("red dog", ""), ("", "")]


@pytest.mark.parametrize(
    ("entity", "reason"),
    [
        ("dog", "entity is not an object"),
        ({"text": "dog"}, "entity span is not"),
        ({"text": "dog", "span": [4, 99]}, "outside the caption"),
        ({"text": "dog", "span": [4, 4]}, "outside the caption"),
        ({"text": "dog", "span": [0, 3]}, "does not hold its text"),
        ({"span": [4, 7]}, "no field text"),
    ],
)
def test_wrong_entities_are_rejected_with_a_reason(entity, reason):
    with pytest.raises(Rejected, match=reason):
        order_entities("red dog", [entity])
