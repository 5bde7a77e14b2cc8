"""What the published protocols fix, spelt out: subjects, texts, noise rows, captions, crops.

The values were read in the authors' files, and none is computed by the code under test. Long
because lists of texts stand here a second time, whole.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from PIL import Image

from megatron_kosmosg.evaluation import coco, dreambench
from megatron_kosmosg.evaluation.preprocessing import (
    short_side_size,
    torchvision_offset,
    transformers_offset,
)

GOOGLE = {
    "object": """\
a {0} in the jungle
a {0} in the snow
a {0} on the beach
a {0} on a cobblestone street
a {0} on top of pink fabric
a {0} on top of a wooden floor
a {0} with a city in the background
a {0} with a mountain in the background
a {0} with a blue house in the background
a {0} on top of a purple rug in a forest
a {0} with a wheat field in the background
a {0} with a tree and autumn leaves in the background
a {0} with the Eiffel Tower in the background
a {0} floating on top of water
a {0} floating in an ocean of milk
a {0} on top of green grass with sunflowers around it
a {0} on top of a mirror
a {0} on top of the sidewalk in a crowded street
a {0} on top of a dirt road
a {0} on top of a white rug
a red {0}
a purple {0}
a shiny {0}
a wet {0}
a cube shaped {0}""",
    "live": """\
a {0} in the jungle
a {0} in the snow
a {0} on the beach
a {0} on a cobblestone street
a {0} on top of pink fabric
a {0} on top of a wooden floor
a {0} with a city in the background
a {0} with a mountain in the background
a {0} with a blue house in the background
a {0} on top of a purple rug in a forest
a {0} wearing a red hat
a {0} wearing a santa hat
a {0} wearing a rainbow scarf
a {0} wearing a black top hat and a monocle
a {0} in a chef outfit
a {0} in a firefighter outfit
a {0} in a police outfit
a {0} wearing pink glasses
a {0} wearing a yellow shirt
a {0} in a purple wizard outfit
a red {0}
a purple {0}
a shiny {0}
a wet {0}
a cube shaped {0}""",
}
"""google/dreambooth's two lists, without the unique token."""
CLASSES = """\
backpack,backpack
backpack_dog,backpack
bear_plushie,stuffed animal
berry_bowl,bowl
can,can
candle,candle
cat,cat
cat2,cat
clock,clock
colorful_sneaker,sneaker
dog,dog
dog2,dog
dog3,dog
dog5,dog
dog6,dog
dog7,dog
dog8,dog
duck_toy,toy
fancy_boot,boot
grey_sloth_plushie,stuffed animal
monster_toy,toy
pink_sunglasses,glasses
poop_emoji,toy
rc_car,toy
red_cartoon,cartoon
robot_toy,toy
shiny_sneaker,sneaker
teapot,teapot
vase,vase
wolf_plushie,stuffed animal"""
"""google/dreambooth's prompts_and_classes.txt."""
KEPT = (
    "backpack 02,backpack_dog 02,bear_plushie 03,berry_bowl 02,can 01,candle 02,cat 04,cat2 02,"
    "clock 03,colorful_sneaker 01,dog 02,dog2 02,dog3 05,dog5 00,dog6 02,dog7 01,dog8 04,"
    "duck_toy 01,fancy_boot 02,grey_sloth_plushie 04,monster_toy 04,pink_sunglasses 04,"
    "poop_emoji 00,rc_car 03,red_cartoon 00,robot_toy 00,shiny_sneaker 01,teapot 04,vase 02,"
    "wolf_plushie 04"
)
"""What the authors' shell script leaves of each folder."""


def test_the_thirty_images_are_those_that_the_authors_keep():
    found = [f"{s.name} {s.file.removesuffix('.jpg')}" for s in dreambench.SUBJECTS]
    assert ",".join(found) == KEPT
    assert "\n".join(f"{s.name},{s.word}" for s in dreambench.SUBJECTS) == CLASSES
    assert Counter(s.kind for s in dreambench.SUBJECTS) == {"object": 21, "live": 9}
    lines = "".join(f"{s.sha256}  {s.name}/{s.file}\n" for s in dreambench.SUBJECTS)
    # `sha256sum` over the 30 files at google/dreambooth@4f887af, hashed as a text.
    assert (
        hashlib.sha256(lines.encode()).hexdigest()
        == "e9b1066b0cc15e852a6b1f87fb106a4115de8aadd051798b8965801630c8d6ca"
    )


def test_the_750_texts_of_one_subject():
    kinds = {subject.name: subject.kind for subject in dreambench.SUBJECTS}
    expected = [
        text.format(word)
        for name, word in (line.split(",") for line in CLASSES.splitlines())
        for text in GOOGLE[kinds[name]].splitlines()
    ]
    cases = list(dreambench.single_cases())
    assert [case.text for case in cases] == expected and len(expected) == 750
    assert len({case.name for case in cases}) == 750


def test_what_the_model_is_given_begins_with_the_image():
    first = [case.words for case in dreambench.single_cases()][:25]
    places = [line.removeprefix("a {0} ") for line in GOOGLE["object"].splitlines()[:20]]
    qualities = [", red", ", purple", ", shiny", ", wet", ", cube shaped"]
    assert first == [("", words) for words in (*places, *qualities)]
    named = [case.words for case in dreambench.single_cases(with_class=True)]
    assert named[50] == ("stuffed animal", "in the jungle")
    assert [before for before, _ in named[::25]] == [
        line.split(",")[1] for line in CLASSES.splitlines()
    ]


PAIR_TEXTS = {
    0: "a backpack and a stuffed animal in the jungle",
    10: "a backpack and a stuffed animal with a wheat field in the background",
    24: "a cube shaped backpack and a cube shaped stuffed animal",
    250: "a cat and a dog in the jungle",
    263: "a cat wearing a black top hat and a monocle, next to it is a dog",
    270: "a red cat, next to it is a dog",
    500: "a cat and a backpack in the jungle",
    519: "a cat in a purple wizard outfit, next to it is a backpack",
    749: "a cube shaped dog, next to it is a teapot",
}
"""Rows of UNO's dreambench_multiip.json."""


def test_the_750_texts_of_two_subjects():
    cases = list(dreambench.pair_cases())
    assert len(cases) == 750 and len({case.name for case in cases}) == 750
    assert {i: cases[i].text for i in PAIR_TEXTS} == PAIR_TEXTS
    kinds = Counter("+".join(s.kind for s in case.subjects) for case in cases)
    assert kinds == {"object+object": 250, "live+live": 250, "live+object": 250}
    assert cases[0].words == ("", "and", "in the jungle")
    assert cases[24].words == ("a cube shaped", "and a cube shaped", "")
    assert cases[263].words[1] == "wearing a black top hat and a monocle, next to it is"
    named = list(dreambench.pair_cases(with_class=True))
    assert named[0].words == ("a backpack", "and a stuffed animal", "in the jungle")
    assert named[270].words == ("a red cat", ", next to it is a dog", "")


def test_the_authors_noise_rows():
    assert [dreambench.authors_noise_row(0, k) for k in range(4)] == [0, 5, 10, 15]
    assert dreambench.authors_noise_row(24, 3) == 19
    rows = {dreambench.authors_noise_row(p, k) for p in range(5, 10) for k in range(4)}
    assert rows == set(range(20))
    assert [coco.authors_noise_row(i) for i in (0, 15, 16, 29_999)] == [0, 15, 0, 15]


def test_the_authors_captions():
    drawn = coco.caption_indices(202_654)
    assert drawn[:5] == [100989, 198693, 110250, 10612, 67873]
    assert len(drawn) == len(set(drawn)) == 30_000


@pytest.mark.parametrize(
    ("length", "side", "torchvision", "transformers"),
    [(256, 224, 16, 16), (227, 224, 2, 1), (225, 224, 0, 0), (231, 224, 4, 3), (229, 224, 2, 2)],
)
def test_where_a_centre_crop_begins(length, side, torchvision, transformers):
    """They differ where the length is 3 more than the side, modulo 4."""
    assert torchvision_offset(length, side) == torchvision
    assert transformers_offset(length, side) == transformers


def test_the_long_side_is_truncated():
    assert short_side_size((640, 427), 256) == (383, 256)  # 383.7
    assert short_side_size((427, 640), 224) == (224, 335)
    assert short_side_size(Image.new("RGB", (9, 9)).size, 256) == (256, 256)
