"""`kosmosg evaluate pairs`: its numbers, the same from any number of ranks, and after any stop."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_kosmosg.cli.evaluate_pairs import main
from megatron_kosmosg.evaluation import feature_files, networks
from megatron_kosmosg.evaluation.similarity import Item, summarise
from megatron_kosmosg.toy.stand_in_networks import write_clip, write_dino
from tests.support.evaluated_images import odd_images

TEXTS = ["a red circle", "a blue square", "two green stars"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Images, a list of them, and networks."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, seed, ending in (("generated", 1, "png"), ("reference", 2, "jpg")):
        (folder / name).mkdir()
        for i, image in enumerate(odd_images(6, seed)):
            image.save(folder / name / f"{i}.{ending}")
    records = [
        {"generated": f"generated/{i}.png", "reference": [f"reference/{j}.jpg" for j in (i, 5)]}
        | ({"text": TEXTS[i % 3]} if i else {})
        for i in range(6)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    write_dino(folder / "dino.pth")
    write_clip(folder / "clip")
    return folder


def listed(world: Path, output: Path, *more: str) -> list[str]:
    clip, pairs = world / "clip", world / "pairs.jsonl"
    return [f"--pairs={pairs}", f"--clip={clip}", f"--output={output}", *more]


def test_the_scores_are_those_of_transformers(world, tmp_path, capsys):
    assert main(listed(world, tmp_path / "out")) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    model = CLIPModel.from_pretrained(world / "clip").eval()
    processor = CLIPImageProcessorPil()

    def seen(name: str) -> torch.Tensor:
        pixels = processor(images=Image.open(world / name).convert("RGB"), return_tensors="pt")
        return model.get_image_features(**pixels).pooler_output[0]

    words = CLIPTokenizer.from_pretrained(world / "clip")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        texts = model.get_text_features(**words).pooler_output
        by_text, by_image = [], []
        for i in range(6):
            image = seen(f"generated/{i}.png")
            pair = [F.cosine_similarity(image, seen(f"reference/{j}.jpg"), dim=0) for j in (i, 5)]
            assert result["items"][i]["clip_i"] == pytest.approx([float(p) for p in pair], abs=2e-6)
            by_image.append(float(sum(pair)) / 2)
            if i:
                by_text.append(float(F.cosine_similarity(image, texts[i % 3], dim=0)))
    found = result["metrics"]
    assert found["clip_i"]["value"] == pytest.approx(sum(by_image) / 6, abs=2e-6)
    assert found["clip_t"]["value"] == pytest.approx(max(0, sum(by_text) / 5), abs=2e-6)
    assert (found["clip_i"]["n"], found["clip_t"]["n"]) == (6, 5)
    assert found["clip_i"]["low"] <= found["clip_i"]["value"] <= found["clip_i"]["high"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "http" not in page and page.count("data:image/jpeg") > 12
    assert "CLIP-I" in capsys.readouterr().out


def test_two_ranks_a_stop_and_one_rank_give_the_same_bytes(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_files, "SHARD_ITEMS", 2)
    assert main(listed(world, tmp_path / "one")) == 0
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    computed = networks.ClipNetwork.features
    calls = 0

    def stopping(self, pixels):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return computed(self, pixels)

    monkeypatch.setattr(networks.ClipNetwork, "features", stopping)
    two = listed(world, tmp_path / "two")
    assert main(two) == 130
    before = {path: path.stat().st_ino for path in (tmp_path / "two").rglob("*.safetensors")}
    assert len(before) == 1
    assert main(two) == 0
    assert "the rank that finishes last" in capsys.readouterr().out
    assert all(path.stat().st_ino == inode for path, inode in before.items())
    monkeypatch.setenv("RANK", "0")
    assert main(two) == 0
    for name in ("result.json", "report.html"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("is_renamed", [False, True], ids=["before", "after"])
def test_killed_at_any_file_and_run_again_the_result_is_the_same(
    world, tmp_path, monkeypatch, is_renamed
):
    """Before or after each file gets its name; what had not, stays as rubbish beside it."""
    monkeypatch.setattr(feature_files, "SHARD_ITEMS", 2)
    assert main(listed(world, tmp_path / "whole")) == 0
    expected = [(tmp_path / "whole" / name).read_bytes() for name in ("result.json", "report.html")]
    num_files = sum(path.is_file() for path in (tmp_path / "whole").rglob("*"))
    assert num_files == 3 + 3 + 2 + 2  # generated, references, texts; the result
    rename, left = os.replace, 0

    def killed(source, target):
        nonlocal left
        left -= 1
        if left == 0:
            if is_renamed:
                rename(source, target)
            else:
                shutil.copy(source, f"{source}.left")
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for number in range(1, num_files + 1):
        out, left = tmp_path / f"{number}", number
        with pytest.raises(Killed):
            main(listed(world, out))
        assert (out / "result.json").exists() == (number + is_renamed > num_files - 1)
        left = 0
        assert main(listed(world, out)) == 0
        found = [(out / name).read_bytes() for name in ("result.json", "report.html")]
        assert found == expected, number


def test_folders_by_name_and_what_changes_is_scored_anew(world, tmp_path, capsys):
    shutil.copytree(world / "generated", tmp_path / "generated")
    arguments = [
        *(f"--generated={tmp_path / 'generated'}", f"--reference={world / 'reference'}"),
        *(f"--dino={world / 'dino.pth'}", f"--output={tmp_path / 'out'}"),
    ]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "out" / "result.json").read_text())
    Image.open(world / "reference" / "0.jpg").save(tmp_path / "generated" / "0.png")
    kept = (tmp_path / "out" / "features" / "references-000000.safetensors").stat().st_ino
    assert main(arguments) == 0
    second = json.loads((tmp_path / "out" / "result.json").read_text())
    assert second["items"][0]["dino"] == 1.0 > first["items"][0]["dino"]
    assert second["items"][1:] == first["items"][1:]
    assert (tmp_path / "out" / "features" / "references-000000.safetensors").stat().st_ino == kept
    (tmp_path / "generated" / "7.png").write_bytes(b"x")
    capsys.readouterr()
    assert main(arguments) == 2
    assert "7.png has no partner of that name" in capsys.readouterr().err


def test_a_damaged_image_is_named(world, tmp_path, capsys):
    shutil.copytree(world / "reference", tmp_path / "reference")
    damaged = tmp_path / "reference" / "3.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    arguments = [f"--generated={world / 'generated'}", f"--reference={tmp_path / 'reference'}"]
    arguments += [f"--dino={world / 'dino.pth'}", f"--output={tmp_path / 'out'}"]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {damaged} cannot be read as an image")
    assert not (tmp_path / "out" / "result.json").exists()


def test_wrong_files_are_named(world, tmp_path, capsys):
    bad = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    bad.write_bytes(b"cut short")
    assert main(listed(world, tmp_path / "out", f"--inception={bad}")) == 2
    assert "not with 6726825d as its name says" in capsys.readouterr().err
    assert main(listed(world, tmp_path / "out", f"--dino={bad}")) == 2
    assert "cannot be read as plain data" in capsys.readouterr().err
    torch.save({"norm.weight": torch.zeros(384)}, bad.with_name("other.pth"))
    assert main(listed(world, tmp_path / "out", f"--dino={bad.with_name('other.pth')}")) == 2
    assert "does not hold the weights of DINO's ViT-S/16" in capsys.readouterr().err
    outside = tmp_path / "list" / "pairs.jsonl"
    outside.parent.mkdir()
    outside.write_text(json.dumps({"generated": "../dino.pth", "text": "x"}))
    clip = f"--clip={world / 'clip'}"
    assert main([f"--pairs={outside}", clip, f"--output={tmp_path / 'out'}"]) == 2
    assert "lies outside" in capsys.readouterr().err


def test_an_interval_draws_clusters():
    """Twenty equal images of one subject say no more than one of them."""
    items = [Item(f"{i}", Path(), cluster=f"{i % 2}") for i in range(40)]
    found = summarise(items, [[float(i % 2)] for i in range(40)])
    assert (found.value, found.low, found.high, found.count) == (0.5, 0.0, 1.0, 40)
    alone = summarise(
        [Item(f"{i}", Path()) for i in range(40)], [[float(i % 2)] for i in range(40)]
    )
    assert 0.3 < alone.low < 0.5 < alone.high < 0.7
    below = summarise([Item("a", Path())], [[-0.5]])
    assert (below.value, below.low, below.high) == (0.0, 0.0, 0.0)
