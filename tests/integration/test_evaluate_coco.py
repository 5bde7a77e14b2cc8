"""`kosmosg evaluate coco` on a folder of COCO's form, with stand-in networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_kosmosg.cli.evaluate_coco import main
from megatron_kosmosg.toy.stand_in_networks import write_clip
from tests.support.evaluated_images import write_coco
from tests.support.scoring_networks import write_inception


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder / "coco")
    write_clip(folder / "clip")
    write_inception(folder / "inception.pth")
    return folder


def test_from_a_model_to_fid_and_statistics_that_are_kept(world, past, tmp_path, capsys):
    kept = tmp_path / "kept" / "real.safetensors"
    arguments = [
        *(f"--model={past / 'export'}", f"--coco={world / 'coco'}", f"--clip={world / 'clip'}"),
        *(f"--inception={world / 'inception.pth'}", f"--real-statistics={kept}"),
        *("--num-captions=2", "--steps=1", "--scheduler=ddim", "--noise=authors"),
    ]
    assert main([*arguments, f"--output={tmp_path / 'a'}"]) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    fid = result["metrics"]["fid"]
    assert (fid["n_real"], fid["n_generated"], fid["is_biased"]) == (3, 2, True)
    assert fid["value"] > 0 and fid["protocol"] == "kosmosg-rerun"
    assert result["weights"]["inception"]["is_published"] is False
    drawn = Image.open(tmp_path / "a" / "images" / "00001-0.png")
    settings = json.loads(drawn.info["settings"])
    assert settings["noise"] == [1, 16] and drawn.info["prompt"].startswith("a red circle")
    page = (tmp_path / "a" / "report.html").read_text()
    for row in ("KOSMOS-G-1.9B</td><td class=num>10.99", "24 layers</td><td class=num>9.55"):
        assert row in page
    assert page.count(f"<b>{fid['value']:.4f}</b>") == 3  # the result, and beside both tables

    # Another output takes the real images' statistics from the file, and reads no real image.
    again = [*arguments, f"--output={tmp_path / 'b'}"]
    assert main([*again, "--fid-protocol=metaquery"]) == 2
    assert "was made with another protocol" in capsys.readouterr().err
    assert main(again) == 0
    assert not list((tmp_path / "b" / "features").glob("fid-real*"))
    assert (tmp_path / "b" / "result.json").read_bytes() == (
        tmp_path / "a" / "result.json"
    ).read_bytes()


def test_values_rounded_down_are_those_that_the_authors_first_run_compares(world, past, tmp_path):
    """Their script hands the decoder's floats to torchmetrics, which cuts them to bytes."""
    arguments = [f"--model={past / 'export'}", f"--coco={world / 'coco'}", "--num-captions=2"]
    arguments += ["--steps=1", "--only=generate"]
    pixels = {}
    for rounding in ("nearest", "down"):
        out = tmp_path / rounding
        assert main([*arguments, f"--rounding={rounding}", f"--output={out}"]) == 0
        drawn = Image.open(out / "images" / "00001-0.png")
        pixels[rounding] = np.asarray(drawn).astype(int)
        assert ("rounding" in json.loads(drawn.info["settings"])) == (rounding == "down")
    higher = pixels["nearest"] - pixels["down"]
    assert set(np.unique(higher)) == {0, 1} and 0.3 < higher.mean() < 0.7


def test_an_image_that_is_missing_or_too_many_is_named(world, past, tmp_path, capsys):
    coco = write_coco(tmp_path / "coco")
    gone = sorted((coco / "val2014").iterdir())[1]
    gone.unlink()
    arguments = [f"--model={past / 'export'}", f"--coco={coco}", f"--output={tmp_path / 'out'}"]
    arguments += [f"--inception={world / 'inception.pth'}", "--num-captions=2", "--steps=1"]
    assert main(arguments) == 2
    assert f"no {gone} (1 of 3 images" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(gone)
    more = gone.with_name("holiday.jpg")
    Image.new("RGB", (8, 8)).save(more)
    assert main(arguments) == 2
    assert f"{more} is in no row of annotations/captions_val2014.json (1 images" in (
        capsys.readouterr().err
    )
    assert main([*arguments, "--num-captions=5"]) == 2
    assert "5 captions are asked for; there are 4" in capsys.readouterr().err
