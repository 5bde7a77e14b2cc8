"""`kosmosg evaluate dreambench` from an exported toy model to the page, with stand-in networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_kosmosg.cli.evaluate_dreambench import main
from megatron_kosmosg.inference.image_plan import ImagePlan, RunSettings
from megatron_kosmosg.inference.pipeline_generator import PipelineGenerator
from megatron_kosmosg.inference.prompt_records import GenerationOptions, NoiseRow, PromptRecord
from megatron_kosmosg.toy.stand_in_networks import write_clip
from tests.support.evaluated_images import write_dreambooth
from tests.support.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dreambench")
    write_dreambooth(folder / "dreambooth")
    write_clip(folder / "clip")
    return folder


@pytest.fixture
def arguments(world, past, tmp_path) -> list[str]:
    return [
        *(f"--model={past / 'export'}", f"--dreambooth={world / 'dreambooth'}"),
        *(f"--clip={world / 'clip'}", f"--output={tmp_path / 'out'}"),
        *("--num-prompts=1", "--num-images=1", "--steps=1"),
    ]


def test_from_a_model_to_the_page(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    out = tmp_path / "out"
    result = json.loads((out / "result.json").read_text())
    assert [item["name"] for item in result["items"]][:2] == ["backpack-00-0", "backpack_dog-00-0"]
    assert result["items"][2]["text"] == "a stuffed animal in the jungle"
    assert result["items"][2]["references"] == ["03.jpg"]
    assert result["metrics"]["clip_i"]["n"] == result["metrics"]["clip_t"]["n"] == 30
    assert result["intervals"]["clusters"] == 30 and set(result["tables"]) == {"subject", "prompt"}
    assert "not those of google/dreambooth@4f887af" in result["warnings"][0]
    page = (out / "report.html").read_text()
    assert "http" not in page
    assert "<td>KOSMOS-G, one image</td><td class=num>0.694</td>" in page
    assert "<td>Re-Imagen</td><td class=num>0.600</td><td class=num>0.740</td>" in page
    assert f"<b>{result['metrics']['clip_i']['value']:.4f}</b>" in page.split("Table 1")[1]

    # A damaged image is drawn again, the rest is kept, and the result is the same.
    before = (out / "result.json").read_bytes()
    whole = (out / "images" / "can-00-0.png").read_bytes()
    (out / "images" / "can-00-0.png").write_bytes(whole[:-30])
    capsys.readouterr()
    assert main(arguments) == 0
    assert "1 drawn, 29 kept" in capsys.readouterr().out
    assert (out / "images" / "can-00-0.png").read_bytes() == whole
    assert (out / "result.json").read_bytes() == before

    # All real images of a subject in place of the one that was shown.
    assert main([*arguments, "--references=all", "--only=score"]) == 0
    every = json.loads((out / "result.json").read_text())
    assert "60 real images, 158 at google/dreambooth" in every["warnings"][1]
    every = every["items"][0]
    assert every["references"] == ["02.jpg", "99.jpg"]
    assert every["clip_i"][0] == result["items"][0]["clip_i"] != every["clip_i"][1]


def test_pairs_of_subjects_and_ranks(arguments, tmp_path, monkeypatch, capsys):
    pairs = [*arguments, "--num-subjects=2", "--with-class"]
    assert main([*pairs, "--only=score"]) == 2
    assert "backpack_dog+bear_plushie-00-0.png is not there; --only generate" in (
        capsys.readouterr().err
    )
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    assert main(pairs) == 2
    assert "2 ranks take one step at a time" in capsys.readouterr().err
    for step in ("generate", "score"):
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            assert main([*pairs, f"--only={step}"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    item = result["items"][0]
    assert item["references"] == ["02.jpg", "03.jpg"] and len(item["clip_i"]) == 2
    assert item["text"] == "a backpack and a stuffed animal in the jungle"
    found = result["metrics"]["clip_i"]
    columns = zip(*(item["clip_i"] for item in result["items"]), strict=True)
    assert list(found["by_reference"].values()) == pytest.approx(
        [max(0, sum(column) / 30) for column in columns], abs=2e-6
    )
    assert sum(found["by_reference"].values()) / 2 == pytest.approx(found["value"], abs=2e-6)
    assert "CLIP-I, second subject" in (tmp_path / "out" / "report.html").read_text()
    prompt = Image.open(tmp_path / "out" / "images" / "cat+dog-00-0.png").info["prompt"]
    assert prompt == "a cat <image> and a dog <image> in the jungle"


def test_a_missing_input_image_is_named(arguments, world, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([*arguments, f"--dreambooth={empty}"]) == 2
    assert f"no {empty / 'backpack' / '02.jpg'} (30 of 30" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--noise=authors"])
    assert "belongs to --num-images 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_subject_that_is_none_of_the_thirty_is_named(arguments, tmp_path, capsys):
    folder = write_dreambooth(tmp_path / "dreambooth")
    (folder / "dataset" / "mine").mkdir()
    assert main([*arguments, f"--dreambooth={folder}"]) == 2
    assert f"{folder / 'dataset' / 'mine'} is none of the 30" in capsys.readouterr().err


def test_the_authors_noise_is_rows_of_one_draw(tmp_path):
    pipeline = tiny_pipeline(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    plan = ImagePlan(RunSettings("m", "saved", "fp32", GenerationOptions("", 0, 2, 2, 3.0)))
    rows = (NoiseRow(1, 6), NoiseRow(4, 6))
    images = plan.images(PromptRecord("a", ("a red circle",), noise=rows))
    found = PipelineGenerator(pipeline).generate(images)
    side = pipeline.unet.config.sample_size
    drawn = torch.randn(6, 4, side, side, generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        [["a red circle"]],
        num_inference_steps=2,
        guidance_scale=3.0,
        num_images_per_prompt=2,
        latents=drawn[[1, 4]],
        generator=[torch.Generator().manual_seed(p.options.seed) for p in images],
    ).images
    assert [image.tobytes() for image in found] == [image.tobytes() for image in expected]
    assert found[0].tobytes() != found[1].tobytes()
    plain = plan.images(PromptRecord("a", ("a red circle",)))
    assert plain[0].settings_hash != images[0].settings_hash
    assert "noise" not in plain[0].settings
