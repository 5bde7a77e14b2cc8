"""Generating a list of prompts: restarts, ranks, metadata, the sheet; the generator makes noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_kosmosg.files import fingerprint
from megatron_kosmosg.inference import sheet_font
from megatron_kosmosg.inference.contact_sheet import SheetRow, contact_sheet
from megatron_kosmosg.inference.generate import Job, generate, group_key, write_sheet
from megatron_kosmosg.inference.image_files import is_finished
from megatron_kosmosg.inference.image_plan import ImagePlan, PlannedImage, RunSettings
from megatron_kosmosg.inference.prompt_records import (
    GenerationOptions,
    PromptError,
    PromptRecord,
    read_records,
)

DEFAULTS = GenerationOptions(negative_prompt="", seed=7, num_images=2, steps=4, guidance=2.0)
SHEET = "sheet.png"
RUN = RunSettings("model", "saved", "fp32", DEFAULTS)


class NoiseGenerator:
    """Every image is noise of its own seed; `fail_after` calls it breaks down."""

    def __init__(self, fail_after: int = 10**9) -> None:
        self.calls: list[list[str]] = []
        self._fail_after = fail_after

    def check(self, planned_images: Sequence[PlannedImage]) -> None:
        for planned in planned_images:
            if "too long" in planned.record.text:
                raise PromptError(f"{planned.record.id}: too long")

    def generate(self, planned_images: Sequence[PlannedImage]) -> list[Image.Image]:
        assert len({group_key(planned) for planned in planned_images}) == 1
        if len(self.calls) == self._fail_after:
            raise KeyboardInterrupt
        self.calls.append([planned.file_name for planned in planned_images])
        seeds = [planned.options.seed for planned in planned_images]
        noise = [np.random.default_rng(seed).integers(0, 256, (8, 8, 3)) for seed in seeds]
        return [Image.fromarray(pixels.astype(np.uint8)) for pixels in noise]


@pytest.fixture
def records(tmp_path):
    for name, colour in (("cat.png", "red"), ("dog.png", "blue")):
        Image.new("RGB", (9, 6), colour).save(tmp_path / name)
    lines = [
        {"id": "plain", "prompt": "a dög"},
        {"id": "cat", "prompt": "<image> in snow", "images": ["cat.png"], "seed": 5},
        {"id": "both", "prompt": "<image> and <image>", "images": ["cat.png", "dog.png"]},
        {"id": "many", "prompt": "a cat", "num_images": 3, "negative_prompt": "blue"},
        {"id": "last", "prompt": "a house"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return read_records(path)


def quiet(done: int, total: int) -> None:
    pass


def draw_all(
    records, folder: Path, image_generator: NoiseGenerator | None = None, run=RUN, **job
) -> int:
    image_generator = image_generator or NoiseGenerator()
    job = Job(records, ImagePlan(run), folder, SHEET, **job)
    return generate(job, lambda: image_generator, quiet)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_images_say_how_they_were_made(records, tmp_path):
    assert draw_all(records, tmp_path / "out") == 11
    with Image.open(tmp_path / "out" / "cat-1.png") as image:
        texts = image.info
    settings = json.loads(texts["settings"])
    assert (texts["prompt"], texts["seed"], texts["negative_prompt"]) == (
        "<image> in snow",
        "6",
        "",
    )
    assert settings["shown"] == ["cat.png", "in snow"]
    assert (settings["steps"], settings["guidance"], settings["seed"]) == (4, 2.0, 6)
    with Image.open(tmp_path / "out" / "plain-0.png") as image:
        assert image.info["prompt"] == "a dög"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_ranks_together_draw_what_one_rank_draws(records, tmp_path, batch_size):
    one = NoiseGenerator()
    draw_all(records, tmp_path / "one", one, batch_size=batch_size)
    calls = []
    for rank in range(3):
        image_generator = NoiseGenerator()
        draw_all(
            records,
            tmp_path / "three",
            image_generator,
            batch_size=batch_size,
            rank=rank,
            world_size=3,
        )
        calls += image_generator.calls
    assert sorted(calls) == sorted(one.calls)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_an_interrupted_run_continues_and_a_finished_one_opens_no_model(records, tmp_path):
    draw_all(records, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        draw_all(records, tmp_path / "out", NoiseGenerator(fail_after=2))
    assert len(contents(tmp_path / "out")) == 4
    (tmp_path / "out" / "cat-0.png").write_bytes(b"")  # a copy that was cut short
    image_generator = NoiseGenerator()
    assert draw_all(records, tmp_path / "out", image_generator) == 8
    assert (
        image_generator.calls[0] == ["cat-0.png", "cat-1.png"] and len(image_generator.calls) == 4
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

    def no_model():
        raise AssertionError("nothing is missing")

    assert generate(Job(records, ImagePlan(RUN), tmp_path / "out", SHEET), no_model, quiet) == 0


def test_other_settings_draw_again(records, tmp_path):
    draw_all(records, tmp_path)
    for changed in (
        replace(RUN, model="other"),
        replace(RUN, scheduler="ddim"),
        replace(RUN, dtype="bf16"),
        replace(RUN, loras=(("style", 1.0),)),
        *(
            replace(RUN, defaults=replace(DEFAULTS, **{name: value}))
            for name, value in {"steps": 5, "guidance": 3.0, "height": 16}.items()
        ),
    ):
        assert draw_all(records, tmp_path, run=changed) == 11
        assert draw_all(records, tmp_path, run=changed) == 0
    # Records with a seed or a negative prompt of their own do not follow the run's.
    draw_all(records, tmp_path)
    other = replace(RUN, defaults=replace(DEFAULTS, seed=8))
    assert draw_all(records, tmp_path, run=other) == 9
    draw_all(records, tmp_path)
    other = replace(RUN, defaults=replace(DEFAULTS, negative_prompt="red"))
    assert draw_all(records, tmp_path, run=other) == 8
    # Another image behind the same name.
    draw_all(records, tmp_path)
    Image.new("RGB", (9, 6), "green").save(records[1].images[0])
    assert draw_all(records, tmp_path) == 4


def test_seeds_belong_to_the_record_and_not_to_its_place(records):
    def seeds(listed):
        plan = ImagePlan(RUN)
        return {r.id: [p.options.seed for p in plan.images(r)] for r in listed}

    assert seeds(records) == seeds(records[::-1])
    assert seeds(records)["cat"] == [5, 6]
    firsts = [found[0] for found in seeds(records).values()]
    assert len(set(firsts)) == len(firsts)


def test_one_bad_prompt_and_nothing_is_written(records, tmp_path):
    out = tmp_path / "out"
    broken = replace(records[1], id="broken", content=(tmp_path / "none.png",))
    with pytest.raises(PromptError, match="broken: no image .*none.png"):
        draw_all([*records, broken], out)
    with pytest.raises(PromptError, match="long: too long"):
        draw_all([*records, PromptRecord("long", ("too long",))], out)
    with pytest.raises(PromptError, match="plain: a ControlNet needs a control image"):
        draw_all(records, out, run=replace(RUN, controlnet=("net", 1.0)))
    controlled = replace(records[0], options=GenerationOptions(control_image=records[1].images[0]))
    with pytest.raises(PromptError, match="plain: a control image needs --controlnet"):
        draw_all([controlled], out)
    assert not out.exists()


def test_the_sheet_appears_when_all_its_images_are_there(records, tmp_path):
    job = Job(records, ImagePlan(RUN), tmp_path / "out", SHEET)
    assert write_sheet(job, 5) is None
    draw_all(records[:3], tmp_path / "out")
    assert write_sheet(job, 5) is None
    assert write_sheet(job, 0) is None
    with Image.open(write_sheet(job, 3)) as three:
        height = three.height
    draw_all(records, tmp_path / "out")
    with Image.open(write_sheet(job, 5)) as five:
        assert five.height > height
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_sheet_shows_prompt_images_left_of_results_and_keeps_proportions():
    red, wide = Image.new("RGB", (10, 10), "red"), Image.new("RGB", (20, 10), "blue")
    rows = [
        SheetRow("cat: [1] in snow", [("1", red)], [("seed 1", wide)]),
        SheetRow("word " * 60, [], [("seed 1", wide), ("seed 2", red)]),
    ]
    sheet = np.asarray(contact_sheet(rows, 96)).astype(int)
    is_red = (sheet[..., 0] > 250) & (sheet[..., 1] < 5)
    is_blue = (sheet[..., 2] > 250) & (sheet[..., 0] < 5)
    assert is_red.sum() == 2 * 96 * 96 and is_blue.sum() == 2 * 96 * 48
    first_row = slice(0, np.nonzero(is_blue)[0].min() + 60)
    assert np.nonzero(is_red[first_row])[1].max() < np.nonzero(is_blue)[1].min()


def test_a_prompt_without_a_name_gets_one_from_its_words_and_settings(records):
    assert ImagePlan(RUN).named(records[1]) == records[1]
    record = replace(records[1], id=None, content=(*records[1].content, "Snow, (4k)!"))
    name = ImagePlan(RUN).named(record).id
    assert name.startswith("in-snow-snow-4k-") and len(name) == len("in-snow-snow-4k-") + 8
    assert ImagePlan(replace(RUN, dtype="fp16")).named(record).id != name
    only_image = replace(record, content=record.content[:1])
    assert len(ImagePlan(RUN).named(only_image).id) == 8


def test_fingerprints_follow_contents_not_places(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "unet").mkdir(parents=True)
        (tmp_path / place / "unet" / "weights").write_bytes(bytes(3_000_000))
        (tmp_path / place / ".cache").mkdir()
        (tmp_path / place / ".cache" / place).write_text(place)
    same = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "b") == same
    (tmp_path / "b" / "unet" / "weights").write_bytes(bytes(2_999_999) + b"x")
    assert fingerprint(tmp_path / "b") != same
    (tmp_path / "a" / "unet" / "more").write_bytes(b"")
    assert fingerprint(tmp_path / "a") != same
    assert fingerprint(tmp_path / "a", tmp_path / "b") != fingerprint(tmp_path / "b")


def test_a_image_that_is_not_ours_is_not_finished(records, tmp_path):
    (planned, _) = ImagePlan(RUN).images(records[0])
    assert not is_finished(planned, tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / planned.file_name)
    assert not is_finished(planned, tmp_path)


@pytest.mark.parametrize(
    ("text", "plain"),
    [("Kätzchen – dog", "Katzchen - dog"), ("红茶壶", r"\u7ea2\u8336\u58f6"), ("a dog", "a dog")],
)
def test_letters_that_no_font_has_are_spelled_on_a_sheet(monkeypatch, text, plain):
    """They were empty boxes."""
    monkeypatch.setattr(sheet_font, "_others", lambda size: iter(()))
    font, drawn = sheet_font.readable(text, 13)
    assert drawn == plain and font.getname() == ("Aileron", "Regular")


def test_letters_beyond_ascii_are_drawn_where_a_font_has_them():
    """matplotlib, of the extra `demo`, brings one."""
    pytest.importorskip("matplotlib")
    font, drawn = sheet_font.readable("Ka\u0308tzchen, Котёнок", 13)
    assert drawn == "Kätzchen, Котёнок" and font.getname()[0] == "DejaVu Sans"
    _, mixed = sheet_font.readable("Kätzchen हि", 13)
    assert mixed.startswith("Kätzchen") and "\u25cc" not in mixed
