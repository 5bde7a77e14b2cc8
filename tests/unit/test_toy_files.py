"""The toy world as files: the stated truth is what images show; writing is all or nothing.

Parts of the tool (arguments, progress) run here, too; what preprocessing makes of the files is
tested elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_kosmosg.inference.prompt_records import read_records
from megatron_kosmosg.toy.toy_records import WRITERS
from megatron_kosmosg.toy.world import Scene, is_heldout, render
from megatron_kosmosg.toy.world_files import SPLITS, World, is_complete, write_world

TOOL = Path(__file__).parents[2] / "tools" / "make_toy_world.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "world"
    write_world(folder, World(24, 3), lambda done, total: None)
    return folder


def read(world: Path, split: str, kind: str) -> list[dict]:
    return [json.loads(line) for line in (world / split / f"{kind}.jsonl").open()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.int64)


def expected(scene: dict) -> np.ndarray:
    image = (render(Scene.from_json(scene)).numpy().transpose(1, 2, 0) + 1) * 127.5
    return np.rint(image).astype(np.int64)


def assert_shows(path: Path, scene: dict) -> None:
    limit = 0 if path.suffix == ".png" else 60
    assert np.abs(pixels(path) - expected(scene)).max() <= limit, path
    assert np.abs(pixels(path) - expected(scene)).mean() <= (0 if limit == 0 else 4), path


def test_every_named_image_is_there_and_both_formats_are_used(world):
    endings = set()
    for split in SPLITS:
        for kind in WRITERS:
            text = (world / split / f"{kind}.jsonl").read_text()
            for name in {w for w in text.split('"') if w.startswith("images/")}:
                assert pixels(world / split / name).shape[:2] == (32, 32)
                endings.add(name[-3:])
    assert endings == {"png", "jpg"}


def test_heldout_records_state_what_their_images_show(world):
    for kind, field in (("caption", "image"), ("compositional", "image"), ("edit", "target")):
        for record in read(world, "heldout", kind):
            assert_shows(world / "heldout" / record[field], record["scene"])
    for record in read(world, "heldout", "interleaved"):
        shown = [item["image"] for item in record["content"] if "image" in item]
        for name, scene in zip(shown, record["scenes"], strict=True):
            assert_shows(world / "heldout" / name, scene)
            for entity in scene["entities"]:
                assert is_heldout(entity["shape"], entity["pattern"], entity["hue_a"])


def test_training_records_tell_no_truth(world):
    for kind in WRITERS:
        for record in read(world, "train", kind):
            assert not {"scene", "scenes"} & set(record)


def test_entity_images_match_their_masks_and_words(world):
    for record in read(world, "train", "compositional"):
        for entity in record["entities"]:
            start, end = entity["span"]
            assert record["caption"][start:end] == entity["text"]
            image = pixels(world / "train" / entity["image"])
            if entity["mask"] is None:
                assert entity["text"].endswith("background")
                assert np.ptp(image, axis=(0, 1)).max() <= 3
                continue
            mask = pixels(world / "train" / entity["mask"])
            outside = image[mask == 0]
            assert 0.1 < (mask == 255).mean() < 0.9
            target = pixels(world / "train" / record["image"])
            # the entity's image has the background of the target
            assert np.abs(np.median(outside, 0) - np.median(target[:2], (0, 1))).max() <= 8


def test_images_come_before_the_words_that_name_them(world):
    for record in read(world, "train", "interleaved"):
        assert "text" in record["content"][-1]
        kinds = ["image" if "image" in item else "text" for item in record["content"]]
        assert ("image", "image") not in set(zip(kinds, kinds[1:], strict=False))


def test_every_sentence_of_a_document_ends(world):
    for record in read(world, "train", "text"):
        assert record["text"].endswith(" .") and record["text"].count(" .") >= 3


def test_the_same_arguments_give_the_same_bytes(world, tmp_path):
    write_world(tmp_path / "again", World(24, 3), lambda done, total: None)
    for path in sorted(world.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(world)).read_bytes()


def test_a_foreign_folder_is_refused_and_an_older_world_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not a toy world"):
        write_world(tmp_path / "mine", World(1, 0), lambda done, total: None)
    for seed in (0, 1):
        write_world(tmp_path / "w", World(1, seed), lambda done, total: None)
        assert is_complete(tmp_path / "w", World(1, seed))
        assert not is_complete(tmp_path / "w", World(2, seed))
    assert not list(tmp_path.glob("*.tmp"))


def test_nothing_is_left_in_place_when_writing_fails(tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise OSError("disk full")

    with pytest.raises(OSError):
        write_world(tmp_path / "w", World(4, 0), stop)
    assert not (tmp_path / "w").exists()


def test_the_tool_reuses_a_finished_world_and_refuses_bad_sizes(world):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(TOOL), *arguments],
            capture_output=True,
            text=True,
            cwd=TOOL.parents[1],
            env={"PYTHONPATH": str(TOOL.parents[1]), "PATH": "", "OMP_NUM_THREADS": "1"},
        )

    again = run("--output", str(world), "--size", "24", "--seed", "3")
    assert again.returncode == 0 and "left as it is" in again.stdout
    bad = run("--output", str(world), "--size", "0")
    assert bad.returncode == 2 and "--size: 0" in bad.stderr and "Traceback" not in bad.stderr


def test_prompts_name_entities_by_their_images_only(world):
    prompts = read_records(world / "heldout" / "prompts.jsonl")
    records = read(world, "heldout", "compositional")[: len(prompts)]
    assert len(prompts) == 8
    for prompt, record in zip(prompts, records, strict=True):
        words = " ".join(part for part in prompt.content if isinstance(part, str))
        images = [part for part in prompt.content if not isinstance(part, str)]
        assert images == [world / "heldout" / e["image"] for e in record["entities"]]
        expected_words = record["caption"]
        for entity in record["entities"]:
            assert entity["text"] not in words
            expected_words = expected_words.replace(entity["text"], "")
        assert words.split() == expected_words.split()
