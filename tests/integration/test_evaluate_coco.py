"""`kosmosg evaluate coco` on a folder of COCO's form, with stand-in networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_kosmosg.cli.evaluate_coco import main
from tests.support.judging_networks import write_clip, write_coco, write_inception


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
    assert "10.99" in (tmp_path / "a" / "report.html").read_text()

    # Another output takes the real images' statistics from the file, and reads no real image.
    again = [*arguments, f"--output={tmp_path / 'b'}"]
    assert main([*again, "--fid-protocol=metaquery"]) == 2
    assert "was made with another protocol" in capsys.readouterr().err
    assert main(again) == 0
    assert not list((tmp_path / "b" / "features").glob("fid-real*"))
    assert (tmp_path / "b" / "result.json").read_bytes() == (
        tmp_path / "a" / "result.json"
    ).read_bytes()


def test_a_missing_real_image_is_named(world, past, tmp_path, capsys):
    coco = write_coco(tmp_path / "coco")
    gone = sorted((coco / "val2014").iterdir())[1]
    gone.unlink()
    arguments = [f"--model={past / 'export'}", f"--coco={coco}", f"--output={tmp_path / 'out'}"]
    arguments += [f"--inception={world / 'inception.pth'}", "--num-captions=2", "--steps=1"]
    assert main(arguments) == 2
    assert f"no {gone} (1 of 3 images" in capsys.readouterr().err
    assert main([*arguments, "--num-captions=5"]) == 2
    assert "5 captions are asked for; there are 4" in capsys.readouterr().err
