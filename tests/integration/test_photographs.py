"""The photographs that scikit-image ships, from files to images: build, preprocess, inspect, the
three stages at debug size, export, generate, and the page of `kosmosg demo`.

The other tests of whole runs read the toy world: 32-pixel drawings in words of 300 pieces. These
are grey and coloured, wide and tall, up to a thousand pixels. Needs the files of scikit-image (the
package is not imported) and gradio; tests/demo_page.sh brings both, and fails where they are not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from megatron_kosmosg.inference.image_files import read_settings
from megatron_kosmosg.toy import assets
from tests.support.commands import REPOSITORY, Commands
from tests.support.demo_browser import served

MISSING = [name for name in ("skimage", "gradio", "gradio_client") if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING) and "KOSMOSG_REQUIRE_BROWSER" not in os.environ,
        reason=f"not installed: {', '.join(MISSING)} (tests/demo_page.sh installs them)",
    ),
    pytest.mark.timeout(600),
]

PHOTOS = {
    "astronaut.png": ("astronaut", "an astronaut in front of a flag"),
    "brick.png": ("brick wall", "a brick wall"),
    "camera.png": ("man with a camera", "a man with a camera on a meadow"),
    "chelsea.png": ("cat", "the face of a cat"),
    "clock_motion.png": ("clock", "a clock that moves"),
    "coffee.png": ("cup of coffee", "a cup of coffee on a wooden table"),
    "coins.png": ("coins", "coins from pompeii"),
    "grass.png": ("grass", "grass seen from above"),
    "gravel.png": ("gravel", "gravel"),
    "hubble_deep_field.jpg": ("galaxies", "galaxies in a black sky"),
    "moon.png": ("moon", "the surface of the moon"),
    "motorcycle_left.png": ("motorcycle", "a motorcycle in a garage"),
    "motorcycle_right.png": ("motorcycle", "a motorcycle in a garage"),
    "retina.jpg": ("retina", "the retina of an eye"),
    "rocket.jpg": ("rocket", "a rocket that starts at night"),
}
"""{file: (subject, caption)}."""
KINDS = ("caption", "interleaved", "compositional")
MAX_PAGE_BYTES = 5_000_000
SMALL = ("training.train_iters=2", "checkpoint.save_interval=2", "data.num_workers=0")
"""Over the debug configs, which make four updates."""


@pytest.fixture(scope="module")
def commands(preloaded_python) -> Commands:
    return Commands(preloaded_python.venv / "bin" / "python")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder for each subject, a text beside each photograph."""
    found = find_spec("skimage")
    assert found is not None and found.submodule_search_locations
    shipped = Path(found.submodule_search_locations[0], "data")
    folder = tmp_path_factory.mktemp("photos")
    for name, (subject, caption) in PHOTOS.items():
        (folder / subject).mkdir(exist_ok=True)
        shutil.copyfile(shipped / name, folder / subject / name)
        (folder / subject / name).with_suffix(".txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def out(commands, photos, tmp_path_factory) -> Path:
    """`described/`, `built/` and a dataset of each of KINDS in `data/`."""
    out = tmp_path_factory.mktemp("out")
    described = out / "described"
    examples = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "examples")])}
    command = ("-m", "own_pictures", "--pictures", photos, "--output", described)
    commands.run(*command, environment=examples).must_succeed()
    annotations = described / "annotations.jsonl"
    kosmosg(
        commands, "build-data", "--input", photos, "--output", out / "built",
        "--captions", annotations, "--entities", annotations, "--masks", annotations,
    )  # fmt: skip
    with (described / "documents.jsonl").open("w") as documents:
        for line in (described / "captions.jsonl").read_text().splitlines():
            record = json.loads(line)
            content = [{"text": "see ."}, {"image": record["image"]}, {"text": record["caption"]}]
            documents.write(json.dumps({"key": record["key"], "content": content}) + "\n")
    inputs = {
        "caption": described / "captions.jsonl",
        "interleaved": described / "documents.jsonl",
        "compositional": out / "built" / "records" / "*.tar",
    }
    for kind in KINDS:
        kosmosg(
            commands, "preprocess", "--kind", kind, "--input", inputs[kind],
            *(("--image-root", photos) if kind != "compositional" else ()),
            "--tokenizer-model", TOKENIZER, "--output-prefix", out / "data" / kind,
        )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def exported(commands, out) -> Path:
    """The model of the three stages."""
    data = {kind: out / "data" / kind for kind in KINDS}
    train(commands, "pretrain", out, (
        "data.blend.text=null", f"data.blend.caption.path={data['caption']}",
        f"data.blend.interleaved.path={data['interleaved']}",
        f"data.heldout.interleaved.path={data['interleaved']}",
    ))  # fmt: skip
    train(commands, "align", out, (
        f"checkpoint.load={out / 'pretrain'}", f"data.blend.caption.path={data['caption']}",
        f"data.heldout.caption.path={data['caption']}",
    ))  # fmt: skip
    train(commands, "instruct", out, (
        f"checkpoint.load={out / 'align'}", "data.blend.edit=null",
        f"data.blend.caption.path={data['caption']}",
        f"data.blend.compositional.path={data['compositional']}",
        f"data.heldout.compositional.path={data['compositional']}",
    ))  # fmt: skip
    kosmosg(
        commands, "convert", "export-hf", "--input", out / "instruct",
        "--stable-diffusion", assets.path() / "stable-diffusion", "--output", out / "exported",
    )  # fmt: skip
    return out / "exported"


TOKENIZER = assets.path() / "sentencepiece.model"


def kosmosg(commands: Commands, *arguments: object) -> str:
    return commands.run("-m", "megatron_kosmosg", *arguments).must_succeed().text


def train(commands: Commands, stage: str, out: Path, settings: tuple[str, ...]) -> None:
    folder = f"logging.output_dir={out / stage}"
    output = kosmosg(commands, "train", "--config", f"debug_{stage}", folder, *SMALL, *settings)
    (out / f"{stage}.log").write_text(output)


def metrics(run: Path) -> Iterator[dict]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        yield json.loads(line)


def test_every_photograph_becomes_a_sample_of_each_kind(out):
    for kind in KINDS:
        manifest = json.loads((out / "data" / f"{kind}.json").read_text())
        assert manifest["num_samples"] == len(PHOTOS), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_photographs_is_small(commands, out, kind):
    """With as many samples as are shown unasked, at the paper's sizes. Whole photographs in it
    would be 34 MB."""
    output = kosmosg(
        commands, "inspect", out / "data" / kind, "--check",
        "--tokenizer-model", TOKENIZER, "--output", out / f"{kind}.html",
    )  # fmt: skip
    assert "15 samples, 0 problems" in output
    page = (out / f"{kind}.html").read_text()
    assert page.count("data:image/") >= len(PHOTOS)
    assert len(page) < MAX_PAGE_BYTES, f"{len(page):,} bytes"


def test_the_stages_train_on_photographs_and_no_scene_reader_measures_them(out, exported):
    """`debug_instruct` names the toy's evaluator, which knows that these are not its scenes."""
    for stage in ("pretrain", "align", "instruct"):
        found = list(metrics(out / stage))
        assert [line["loss"] > 0 for line in found if line.get("loss") is not None] == [True] * 2
        assert any(line.get("heldout_loss") for line in found)
        assert not [name for line in found for name in line if "toy" in name or "hue" in name]
    assert "the evaluator toy measures nothing" in (out / "instruct.log").read_text()


def test_photographs_draw_images(commands, out, exported, photos):
    prompts = out / "described" / "prompts.jsonl"
    firsts = [
        line for line in prompts.read_text().splitlines() if json.loads(line)["id"][-1] == "0"
    ]
    assert len(firsts) == len({subject for subject, _ in PHOTOS.values()})
    (out / "described" / "firsts.jsonl").write_text("\n".join(firsts))
    output = kosmosg(
        commands, "generate", "--model", exported, "--prompts", out / "described" / "firsts.jsonl",
        "--image-root", photos, "--steps", 2, "--output", out / "drawn",
    )  # fmt: skip
    assert f"{len(firsts)} drawn" in output
    assert read_settings(out / "drawn" / "cat-0-0.png")["steps"] == 2


def test_the_page_draws_from_photographs(exported, photos, tmp_path):
    from gradio_client import Client, handle_file

    names = ["cat/chelsea.png", "cup of coffee/coffee.png"]
    with served(tmp_path, "--model", str(exported)) as (address, _):
        client = Client(address, download_files=str(tmp_path), verbose=False)
        prompt = {
            "text": "a <image> beside a <image>",
            "files": [handle_file(str(photos / name)) for name in names],
        }
        gallery, files, seed, _ = client.predict(
            prompt=prompt, steps=2, seed=3, num_images=2, api_name="/draw"
        )
    assert len(gallery) == len(files) == 2 and seed == 3
    settings = read_settings(Path(files[0]))
    assert settings["shown"] == ["a", "chelsea.png", "beside a", "coffee.png"]
    with Image.open(files[0]) as image:
        assert image.size == (32, 32)
