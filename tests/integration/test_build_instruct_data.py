"""tools/build_instruct_data.py as its users run it, up to a compositional sample that is read."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_kosmosg.construction.build_run import BuildJob, Built, ModelSettings, build
from megatron_kosmosg.construction.record_tars import ImageFormat
from megatron_kosmosg.files import fingerprint
from megatron_kosmosg.launcher import ALONE, RankInfo
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from megatron_kosmosg.toy.toy_captions import caption_parts, join_parts
from megatron_kosmosg.toy.training.pool import to_bytes
from megatron_kosmosg.toy.world import Scene, entity_masks, render, sample_scene
from tests.support.construction_models import write_blip2, write_clipseg, write_language_model
from tests.support.data_helpers import write_jsonl, write_tokenizer
from tests.support.dataset_files import images_of, info_of, read_samples

TOOL = Path(__file__).parents[2] / "tools" / "build_instruct_data.py"
NUM_SCENES = 7
MODELS = ModelSettings(torch.float32, lambda: torch.device("cpu"), fingerprint)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("build_instruct_data", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scene_of(number: int) -> Scene:
    return sample_scene(number, 1 + number % 2, False)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Toy scenes as PNG files, and their captions, entities and true masks in one file."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "pictures").mkdir()
    (folder / "masks").mkdir()
    annotations = []
    for number in range(NUM_SCENES):
        scene = scene_of(number)
        pixels = to_bytes(render(scene)[None])[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
        caption, spans = join_parts(caption_parts(scene, "mix", number), len(scene.entities))
        entities = []
        for i, (mask, span) in enumerate(zip(entity_masks(scene.entities), spans, strict=False)):
            name = f"masks/{number}-{i}.png"
            Image.fromarray((255 * mask).round().byte().numpy()).save(folder / name)
            text = caption[slice(*span)]
            entities.append({"text": text, "span": list(span), "mask": name})
        text = caption[slice(*spans[-1])]
        entities.append({"text": text, "span": list(spans[-1]), "mask": None})
        annotations.append({"key": str(number), "caption": caption, "entities": entities})
    write_jsonl(folder / "annotations.jsonl", annotations)
    return folder


def job(world: Path, output: Path, **changes: object) -> BuildJob:
    file = str(world / "annotations.jsonl")
    made = BuildJob(
        inputs=[str(world / "pictures")],
        output=output,
        captions=file,
        entities=file,
        masks=file,
        options=Options(),
        form=ImageFormat(512, "png"),
        min_entity_side=4,
        shard_size=3,
        batch_size=2,
        num_threads=2,
    )
    return replace(made, **changes)


def tars(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "records").glob("*.tar"))}


def complete(built: Built) -> Built:
    assert built.report is not None
    return built


@pytest.fixture(scope="module")
def toy_output(world, tmp_path_factory, tool) -> Path:
    """The toy images built by the tool from the user's own annotations."""
    output = tmp_path_factory.mktemp("built")
    file = str(world / "annotations.jsonl")
    code = tool.main(
        [
            *("--input", str(world / "pictures"), "--output", str(output), "--captions", file),
            *("--entities", file, "--masks", file, "--min-entity-side", "4"),
            *("--image-format", "png", "--shard-size", "3", "--batch-size", "2"),
        ]
    )
    assert code == 0
    return output


def test_toy_annotations_become_samples_with_the_true_masks(world, toy_output, tmp_path):
    prefix = str(tmp_path / "compositional")
    model = str(write_tokenizer(tmp_path))
    inputs = (str(toy_output / "records" / "*.tar"),)
    preprocess(PreprocessJob("compositional", inputs, model, prefix), lambda *_: None)
    samples = read_samples(prefix)
    assert len(samples) == NUM_SCENES
    for sample in samples:
        info = info_of(sample)
        scene = scene_of(int(info["source"]))
        truth = to_bytes(render(scene)[None])[0].permute(1, 2, 0).numpy()
        target, *rest = (Image.open(io.BytesIO(data)) for data in images_of(sample))
        assert (np.asarray(target) == truth).all()
        masks = (255 * entity_masks(scene.entities)).round().byte().numpy()
        assert [e["has_mask"] for e in info["entities"]] == [True] * len(masks) + [False]
        for mask in masks:
            crop, found = np.asarray(rest.pop(0)), np.asarray(rest.pop(0))
            ys, xs = np.nonzero(mask > 127)
            side = max(np.ptp(ys), np.ptp(xs)) + 1
            assert crop.shape == (side, side, 3) and found.shape == (side, side)
            # Where the square lies: it holds the whole shape and is the image's own pixels.
            places = [
                (top, left)
                for top in range(max(0, ys.max() - side + 1), min(ys.min(), 32 - side) + 1)
                for left in range(max(0, xs.max() - side + 1), min(xs.min(), 32 - side) + 1)
                if (mask[top : top + side, left : left + side] == found).all()
                and (truth[top : top + side, left : left + side] == crop).all()
            ]
            assert places
        (background,) = rest
        assert (np.asarray(background) == truth).all()


def test_the_report_counts_and_the_sheet_shows(toy_output):
    report = json.loads((toy_output / "report.json").read_text())
    assert [step["kept"] for step in report["steps"]] == [NUM_SCENES] * 3
    assert report["entities"] == {"2": 4, "3": 3}
    assert "records: images kept" in (toy_output / "report.txt").read_text()
    with Image.open(toy_output / "contact_sheet.png") as sheet:
        assert sheet.width > 500 and sheet.height > 7 * 150
        assert len(sheet.convert("RGB").getcolors(1 << 24)) > 50


def test_ranks_share_the_work_and_give_the_same_bytes(world, toy_output, tmp_path):
    requested = job(world, tmp_path / "out")
    assert build(requested, RankInfo(1, 2, 1), MODELS).report is None
    assert set(tars(tmp_path / "out")) == {"000001.tar"}
    complete(build(requested, RankInfo(0, 2, 0), MODELS))
    assert tars(tmp_path / "out") == tars(toy_output)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(
        (toy_output / "report.json").read_text()
    )


def test_a_killed_run_goes_on_after_its_finished_shards(world, toy_output, tmp_path):
    source = tmp_path / "world"
    shutil.copytree(world, source)
    requested = job(source, tmp_path / "out")
    code = (
        "import os, sys\n"
        "from megatron_kosmosg.construction import record_tars\n"
        "add, seen = record_tars.RecordWriter.add, []\n"
        "def dying(*arguments):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 5: os.kill(os.getpid(), 9)\n"
        "    return add(*arguments)\n"
        "record_tars.RecordWriter.add = dying\n"
        f"import runpy; sys.argv = {[str(TOOL), *arguments_of(requested)]!r}\n"
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1]), "OMP_NUM_THREADS": "1"}
    died = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert died.returncode == -9, died.stderr.decode()
    assert set(tars(tmp_path / "out")) == {"000000.tar"}
    first = (tmp_path / "out" / "records" / "000000.tar").stat().st_mtime_ns
    complete(build(requested, ALONE, MODELS))
    assert tars(tmp_path / "out") == tars(toy_output)
    assert (tmp_path / "out" / "records" / "000000.tar").stat().st_mtime_ns == first
    assert not list((tmp_path / "out").rglob("*.tmp"))


def arguments_of(requested: BuildJob) -> list[str]:
    return [
        *("--input", *requested.inputs, "--output", str(requested.output)),
        *("--captions", requested.captions, "--entities", str(requested.entities)),
        *("--masks", str(requested.masks), "--min-entity-side", "4", "--image-format", "png"),
        *("--shard-size", "3", "--batch-size", "2"),
    ]


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "captions": str(write_blip2(folder / "blip2")),
        "entities": str(write_language_model(folder / "lm")),
        "masks": str(write_clipseg(folder / "clipseg")),
    }


def test_models_build_records_step_by_step(world, model_folders, tmp_path):
    """Captions first; then, in other runs, entities by rule and masks by CLIPSeg."""
    folder = tmp_path / "pictures"
    shutil.copytree(world / "pictures", folder)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    requested = job(
        world,
        tmp_path / "out",
        inputs=[str(folder)],
        captions=model_folders["captions"],
        entities=None,
        masks=None,
        caption_tokens=5,
        threshold=0.2,
        min_entity_side=2,
    )
    report = complete(build(requested, ALONE, MODELS)).report
    assert (report.steps[0].kept, dict(report.steps[0].rejected)) == (
        NUM_SCENES,
        {"image is truncated": 1},
    )
    requested = replace(requested, entities="noun-phrases", masks=model_folders["masks"])
    built = complete(build(requested, ALONE, MODELS))
    made = built.report.num_records
    assert made + sum(s.rejected.total() for s in built.report.steps) == NUM_SCENES + 1
    assert made > 0, built.report.text()
    preprocess(
        PreprocessJob(
            "compositional",
            (str(tmp_path / "out" / "records" / "*.tar"),),
            str(write_tokenizer(tmp_path)),
            str(tmp_path / "data"),
        ),
        lambda *_: None,
    )
    assert len(read_samples(tmp_path / "data")) == made
    with pytest.raises(ValueError, match="--threshold: 0.2 -> 0.6"):
        build(replace(requested, threshold=0.6), ALONE, MODELS)
    with pytest.raises(ValueError, match="captions was begun with other settings"):
        build(replace(requested, caption_tokens=6), ALONE, MODELS)


def test_what_a_language_model_says_is_checked(world, model_folders, tmp_path):
    requested = job(
        world, tmp_path, entities=model_folders["entities"], masks=None, entity_tokens=4
    )
    report = complete(build(requested, ALONE, MODELS)).report
    assert report.steps[1].kept == 0
    assert set(report.steps[1].rejected) <= {"answer is not a list", "no entity in the caption"}


def test_entities_without_a_mask_are_left_out(world, tmp_path):
    records = [json.loads(x) for x in (world / "annotations.jsonl").read_text().splitlines()]
    del records[0]["entities"][0]["mask"]
    records[1]["entities"][0]["mask"] = "masks/none.png"
    records[2]["entities"] = records[2]["entities"][:1]
    records[2]["entities"][0]["mask"] = "masks/empty.png"
    del records[3]["caption"]
    Image.new("L", (32, 32)).save(world / "masks" / "empty.png")
    file = write_jsonl(world / "faulty.jsonl", records[:6])
    requested = job(world, tmp_path, captions=str(file), entities=str(file), masks=str(file))
    report = complete(build(requested, ALONE, MODELS)).report
    captions, _, made = report.steps
    assert dict(captions.rejected) == {"no field caption": 1, "not in faulty.jsonl": 1}
    assert dict(made.rejected) == {"no entity has a mask": 1}
    assert dict(made.left_out) == {
        "the file has no mask of the entity": 1,
        "mask cannot be read": 1,
        "mask is empty": 1,
    }
    assert report.num_records == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--input": "none/*.tar"}, "--input none/*.tar matches no file"),
        ({"--captions": "none"}, '--captions none is neither a model folder nor a file or "input"'),
        ({"--captions": "CLIPSEG"}, "is of type clipseg; needed: blip-2"),
        ({"--masks": "BLIP2"}, "is of type blip-2; needed: clipseg"),
        ({"--entities": "WORLD"}, "is not a model folder of transformers"),
        ({"--masks": "PICTURE"}, "0.png:1 is not JSON"),
    ],
)
def test_errors_come_before_any_work(
    world, model_folders, tmp_path, tool, capsys, changes, message
):
    names = {
        "CLIPSEG": model_folders["masks"],
        "BLIP2": model_folders["captions"],
        "WORLD": str(world),
        "PICTURE": str(world / "pictures" / "0.png"),
    }
    arguments = arguments_of(job(world, tmp_path / "out"))
    for option, value in changes.items():
        arguments[arguments.index(option) + 1] = names.get(value, value)
    assert tool.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("0*.jsonl"))


def test_an_image_root_that_is_no_folder_is_refused(world, tmp_path, tool, capsys):
    """Else every image would be rejected, one by one."""
    arguments = [*arguments_of(job(world, tmp_path / "out")), "--image-root", "nowhere"]
    assert tool.main(arguments) == 2
    assert "--image-root nowhere is not a folder" in capsys.readouterr().err
