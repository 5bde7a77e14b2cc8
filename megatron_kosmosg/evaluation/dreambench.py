"""DreamBench as KOSMOS-G and UNO use it: 30 subjects, 25 texts each, and 30 pairs of subjects.

Long because its texts and hashes stand here.

The images are google/dreambooth's; one of each subject is the model's input. Two kinds of text
belong together: what the model is given, which begins with the image and no article, and what
CLIP-T compares with, google's prompt without its unique token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.evaluation.result import PublishedTable
from megatron_kosmosg.evaluation.similarity import Item, summarise
from megatron_kosmosg.foreign_files import read_file

Kind = Literal["object", "live"]


@dataclass(frozen=True)
class Subject:
    """One of DreamBench's 30 subjects."""

    name: str
    """Of its folder."""
    file: str
    """The image that the model is shown."""
    word: str
    """Its class, as the texts call it."""
    kind: Kind
    sha256: str
    """Of `file` at google/dreambooth@4f887af."""


def _subject(name: str, file: str, word: str, kind: Kind, sha256: str) -> Subject:
    return Subject(name, f"{file}.jpg", word, kind, sha256)


# fmt: off
SUBJECTS = (
    _subject("backpack", "02", "backpack", "object",
             "113e6661ff47cd0c41e77afd20c194beed2bd13a624371a07e38e4ef366e0d2c"),
    _subject("backpack_dog", "02", "backpack", "object",
             "d7c58f4c3b568be497da581536132e21d5010262ffbbfcefe69f6315a3a10d7a"),
    _subject("bear_plushie", "03", "stuffed animal", "object",
             "9cfc394fa5dc971740938216c2a9e14e8a3729ae42c1562474f9248d4aa53c52"),
    _subject("berry_bowl", "02", "bowl", "object",
             "3ca2f510ca6b9d3b1dd0cb25b3358195d098fe31a8aa2b7d9b370c8a3fdb4246"),
    _subject("can", "01", "can", "object",
             "0be6499890c9f125f84bb94c3570838892c3caf27527ec7f5e342d2e17480808"),
    _subject("candle", "02", "candle", "object",
             "e502da38cb2fd364a6fbb27ff1140ffec233431223a6508b645efb1888459d97"),
    _subject("cat", "04", "cat", "live",
             "62afd15fe7205e514044bb5846299e3b7ef4769ad95a667eb246ae57416d69eb"),
    _subject("cat2", "02", "cat", "live",
             "d6d81497562ff39a58d749a85078fa7fe9734f9c4113e45816f4973697749038"),
    _subject("clock", "03", "clock", "object",
             "0e1eb6ca2c944f3bfaed3ace56f5f186ed073a477e0333e0237253d98f0c9267"),
    _subject("colorful_sneaker", "01", "sneaker", "object",
             "4a6b167131472609ac531a80ed389f4072f7e393ab6faafb7b967df4f04dd917"),
    _subject("dog", "02", "dog", "live",
             "daad1959b4754734000bcb3699d616876f49797960a2c2b36915503fd5a1c1e5"),
    _subject("dog2", "02", "dog", "live",
             "5548b9f76ba808793ff3c9bc73525810f442ba9284dcaa95894a51dda1890879"),
    _subject("dog3", "05", "dog", "live",
             "f91476780363cec20e3324745d1ecce2b53573d9506d6dd245ee0b2e5acb062e"),
    _subject("dog5", "00", "dog", "live",
             "42e96a78608ec2644115b964f5f97ddc48d099f5c458863a7070f4c83aab1a90"),
    _subject("dog6", "02", "dog", "live",
             "ff206a9787229e33e6fdc0810ed902531f7a18b0ddb42e9529d8a605895bcb9e"),
    _subject("dog7", "01", "dog", "live",
             "c8dc22728777cf4be26f5f527b6d96a26a61d5c35dbccb1e0ef9fceb6d107fe8"),
    _subject("dog8", "04", "dog", "live",
             "1994030da6d469b983f04c3e0161f49fb5b3b0a261d5f7dc56aefaed1ae74d8f"),
    _subject("duck_toy", "01", "toy", "object",
             "028d9cef79640084382f3c6a62a103095f1b33f017f80dca183a841d199e1bea"),
    _subject("fancy_boot", "02", "boot", "object",
             "906e947c111602a955caeed0544f8e1352fc6b37063e55df4a3af605ab36680d"),
    _subject("grey_sloth_plushie", "04", "stuffed animal", "object",
             "01cd945206f96e3bb04967ca59c0a82a1ab3f0c1e2bd334ce4a1147de96542fc"),
    _subject("monster_toy", "04", "toy", "object",
             "0acdcfe19e422bac159b2b90eb8702f669175d22761ce6faf21b4b621911824b"),
    _subject("pink_sunglasses", "04", "glasses", "object",
             "0f4ca83b161dbdbcc642235dedfc3c95a3d78f9ad994e2a493b94f4339f6942d"),
    _subject("poop_emoji", "00", "toy", "object",
             "4ad04ad35c2503b8a68265731e0172edba3f62dc7f43b424421349583684660d"),
    _subject("rc_car", "03", "toy", "object",
             "ed3f563a4ec793e34be5ce3810d8c8da3e42c5d4f2fa3e3f4159f6b05ab4307a"),
    _subject("red_cartoon", "00", "cartoon", "object",
             "509d4adff91c58058a3a92affffe4fb0d0b019c4ac5302064e3cfb8ddfc665eb"),
    _subject("robot_toy", "00", "toy", "object",
             "c7b87b86a58fc702b1245498abbc02e5297bad03c657d089675ef6467f91f6cb"),
    _subject("shiny_sneaker", "01", "sneaker", "object",
             "5c1024358a1f840a40590f87ff14f530249c09d8bf1ef0379a8ef45fc1d36797"),
    _subject("teapot", "04", "teapot", "object",
             "db6ae25c7689495cb9650023ea7b2029da3abf8dbfff64ae7caadb4a602e1cff"),
    _subject("vase", "02", "vase", "object",
             "26048d2ea6da0328bb011527793cde0084f6efb029825ce0638554e6b3fcf21c"),
    _subject("wolf_plushie", "04", "stuffed animal", "object",
             "e88eb5df08f7dfe7c878c8836456cceb55816e93f04b60498a9a6159d6eb8946"),
)
# fmt: on
"""In the order of their names, which is that of every list made of them."""

PLACES = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
)
"""Prompts 0 to 9 of all subjects."""
OWN_PLACES: dict[Kind, tuple[str, ...]] = {
    "object": (
        "with a wheat field in the background",
        "with a tree and autumn leaves in the background",
        "with the Eiffel Tower in the background",
        "floating on top of water",
        "floating in an ocean of milk",
        "on top of green grass with sunflowers around it",
        "on top of a mirror",
        "on top of the sidewalk in a crowded street",
        "on top of a dirt road",
        "on top of a white rug",
    ),
    "live": (
        "wearing a red hat",
        "wearing a santa hat",
        "wearing a rainbow scarf",
        "wearing a black top hat and a monocle",
        "in a chef outfit",
        "in a firefighter outfit",
        "in a police outfit",
        "wearing pink glasses",
        "wearing a yellow shirt",
        "in a purple wizard outfit",
    ),
}
"""Prompts 10 to 19."""
QUALITIES = ("red", "purple", "shiny", "wet", "cube shaped")
"""Prompts 20 to 24."""

AUTHORS_BATCH, AUTHORS_IMAGES = 5, 4
"""Prompts that the authors draw together, and images of each."""
NUM_REAL_IMAGES = 158
"""Of all subjects together."""
REAL_REAL_DINO = 0.774
"""DINO of two real images of one subject (DreamBooth, table 1): more says that the input image was
copied."""
PUBLISHED = PublishedTable(
    "Table 1 of the KOSMOS-G paper (arXiv 2310.02992): DreamBench",
    ("DINO", "CLIP-I", "CLIP-T"),
    (
        ("KOSMOS-G, one image", (0.694, 0.847, 0.287)),
        ("SuTI", (0.741, 0.819, 0.304)),
        ("Re-Imagen", (0.600, 0.740, 0.270)),
        ("BLIP-Diffusion", (0.594, 0.779, 0.300)),
        ("BLIP-Diffusion, tuned on the subject", (0.670, 0.805, 0.302)),
        ("DreamBooth, tuned", (0.668, 0.803, 0.305)),
        ("Textual Inversion, tuned", (0.569, 0.780, 0.255)),
        ("real images", (REAL_REAL_DINO, 0.885, None)),
    ),
    digits=3,
)
"""On single subjects. Rows but the first were computed by others, who may average over all real
images of a subject."""


@dataclass(frozen=True)
class DreamBenchCase:
    """One prompt of one subject, or of a pair."""

    name: str
    """Of its images, as part of a file's name: `backpack-07`, `cat+dog-07`."""
    subjects: tuple[Subject, ...]
    prompt: int
    """0 to 24."""
    text: str
    """What CLIP-T compares with."""
    words: tuple[str, ...]
    """What the model is given: words, with an image of `subjects` between each two."""


def single_cases(*, with_class: bool = False) -> Iterator[DreamBenchCase]:
    """The 750 of 30 subjects. with_class: the model is also told what the image shows."""
    for subject in SUBJECTS:
        before = subject.word if with_class else ""
        places = [*PLACES, *OWN_PLACES[subject.kind]]
        texts = [f"a {subject.word} {place}" for place in places]
        texts += [f"a {quality} {subject.word}" for quality in QUALITIES]
        phrases = [*places, *(f", {quality}" for quality in QUALITIES)]
        for i, (text, words) in enumerate(zip(texts, phrases, strict=True)):
            yield DreamBenchCase(f"{subject.name}-{i:02d}", (subject,), i, text, (before, words))


PAIRS = tuple(
    tuple(pair.split("+"))
    for pair in (
        "backpack_dog+bear_plushie berry_bowl+can candle+clock colorful_sneaker+duck_toy "
        "fancy_boot+grey_sloth_plushie monster_toy+pink_sunglasses poop_emoji+rc_car "
        "red_cartoon+robot_toy shiny_sneaker+teapot vase+wolf_plushie "
        "cat+dog cat+dog6 cat+dog8 cat2+cat cat2+dog3 cat2+dog7 dog+dog2 dog3+dog5 dog6+dog7 "
        "dog7+dog8 "
        "cat+backpack cat2+bear_plushie dog+can dog2+clock dog3+duck_toy dog5+grey_sloth_plushie "
        "dog6+pink_sunglasses dog7+rc_car dog8+robot_toy dog6+teapot"
    ).split()
)
"""UNO's: ten of two objects, ten of two animals, ten of an animal and an object."""


def pair_cases(*, with_class: bool = False) -> Iterator[DreamBenchCase]:
    """UNO's 750 of 30 pairs. The model is given the same sentence with images for the subjects.

    Args:
        with_class: whether the subjects' words stand before the images.
    """
    by_name = {subject.name: subject for subject in SUBJECTS}
    for names in PAIRS:
        pair = tuple(by_name[name] for name in names)
        for i, template in enumerate(_pair_templates(pair)):
            text = template.replace("{A}", pair[0].word).replace("{B}", pair[1].word)
            prompt = template
            if not with_class:
                prompt = prompt.replace("a {A}", "{A}").replace("a {B}", "{B}")
            first, rest = prompt.split("{A}")
            middle, last = rest.split("{B}")
            if with_class:
                first, middle = first + pair[0].word, middle + pair[1].word
            words = tuple(part.strip() for part in (first, middle, last))
            yield DreamBenchCase(f"{'+'.join(names)}-{i:02d}", pair, i, text, words)


def _pair_templates(pair: Sequence[Subject]) -> list[str]:
    """The 25 texts for a pair, with {A} and {B} for the subjects' words."""
    if pair[0].kind == "object":
        ends = [*PLACES, *OWN_PLACES["object"]]
        found = [f"a {{A}} and a {{B}} {place}" for place in ends]
        return found + [f"a {quality} {{A}} and a {quality} {{B}}" for quality in QUALITIES]
    found = [f"a {{A}} and a {{B}} {place}" for place in PLACES]
    found += [f"a {{A}} {place}, next to it is a {{B}}" for place in OWN_PLACES["live"]]
    return found + [f"a {quality} {{A}}, next to it is a {{B}}" for quality in QUALITIES]


def authors_noise_row(prompt: int, image: int) -> int:
    """Row of the authors' draw of 20 that image `image` (0 to 3) of a prompt starts from: they set
    the seed anew before each batch, and repeat its 5 prompts four times."""
    return image * AUTHORS_BATCH + prompt % AUTHORS_BATCH


def find_images(folder: Path) -> dict[str, Path]:
    """The image that the model is shown of each subject, by its name, in a checkout of
    google/dreambooth or in its dataset/. Raises InputError that names the first that is not there,
    or a folder of another subject, which would not count."""
    root = folder / "dataset" if (folder / "dataset").is_dir() else folder
    found = {subject.name: root / subject.name / subject.file for subject in SUBJECTS}
    missing = [path for path in found.values() if not path.is_file()]
    if missing:
        raise InputError(
            f"--dreambooth {folder}: no {missing[0]} ({len(missing)} of {len(found)} images are "
            "not there); give a checkout of google/dreambooth"
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    others = [path for path in folders if path.name not in found]
    if others:
        raise InputError(
            f"--dreambooth {folder}: {others[0]} is none of the 30 subjects; take it away, and "
            "score images of other subjects with `evaluate pairs`"
        )
    return found


def real_images(shown: Path) -> list[Path]:
    """All real ones of the subject that `shown` is of."""
    return sorted(shown.parent.glob("*.jpg"))


def warnings_of(
    items: Sequence[Item],
    scores: Mapping[str, Sequence[Sequence[float]]],
    data: Mapping[str, Path],
    *,
    takes_all: bool,
) -> list[str]:
    """What a reader of the numbers should know. takes_all: all real images are references."""
    found = []
    digests = {s.name: hashlib.sha256(read_file(data[s.name])).hexdigest() for s in SUBJECTS}
    others = [s.name for s in SUBJECTS if digests[s.name] != s.sha256]
    if others:
        found.append(
            f"{len(others)} of {len(SUBJECTS)} input images are not those of "
            f"google/dreambooth@4f887af, among them {others[0]}'s: values compare with no others"
        )
    real = sum(len(real_images(data[subject.name])) for subject in SUBJECTS)
    if takes_all and real != NUM_REAL_IMAGES:
        found.append(
            f"the subjects have {real} real images, {NUM_REAL_IMAGES} at google/dreambooth@4f887af"
        )
    dino = summarise(items, scores["dino"]).value if "dino" in scores else 0.0
    if dino > REAL_REAL_DINO:
        found.append(
            f"DINO {dino:.3f} is above {REAL_REAL_DINO}, that of two real images of one subject: "
            "the input images may have been copied"
        )
    return found
