"""examples/own_pictures.sh from stand-ins of the public folders to drawn images, and what it and
the commands say of layouts that cannot be read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from matplotlib import cbook
from own_pictures.__main__ import describe, main
from PIL import Image

from megatron_kosmosg.config.errors import ConfigError, ConversionError
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.needed_files import validate_files
from megatron_kosmosg.config.schema import AlignerConfig
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.import_hf import import_kosmos2
from megatron_kosmosg.conversion.stable_diffusion import StableDiffusion
from megatron_kosmosg.models.diffusion import FrozenDiffusion
from megatron_kosmosg.stages import stage_facts
from megatron_kosmosg.toy import assets
from tests.support.commands import REPOSITORY
from tests.support.conversion_models import VOCAB_SIZE
from tests.support.public_folders import write_half_variant, write_kosmos2, write_pickles
from tests.support.tiny_models import model_config

TOY = assets.path() / "stable-diffusion"
SIZE = 32
MODEL = model_config()
SETTINGS = (
    f"model.vocab_size={VOCAB_SIZE}",
    *(
        f"model.{part}.{name}={getattr(getattr(MODEL, part), name)}"
        for part, names in {
            "decoder": ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
            "vision": ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
            "resampler": ("num_latent_queries", "num_attention_heads"),
        }.items()
        for name in names
    ),
    *("model.vision.image_size=28", "model.vision.patch_size=14"),
    *("model.aligner.num_layers=2", "model.aligner.hidden_size=96"),
    *("model.aligner.ffn_hidden_size=96", "model.aligner.num_attention_heads=4"),
    *("model.aligner.num_queries=21", "model.aligner.max_positions=256"),
    *("training.train_iters=2", "training.micro_batch_size=1", "training.global_batch_size=2"),
    *("training.precision=fp32", "training.eval_interval=0", "training.eval_iters=1"),
    *("optimizer.lr_warmup_iters=1", "checkpoint.save_interval=2", "data.num_workers=0"),
    *("logging.tensorboard=false", "logging.image_interval=0", "logging.num_images=1"),
    "logging.num_inference_steps=2",
)
"""What makes the shipped configs for one GPU a matter of seconds on a CPU."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Photographs that matplotlib ships, of a subject with a folder, and one named by itself."""
    folder = tmp_path_factory.mktemp("photos")
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        (folder / "grace hopper").mkdir()
        photo.save(folder / "grace hopper" / "IMG_1.jpg")
        photo.crop((100, 50, 400, 350)).save(folder / "grace hopper" / "IMG_2.jpg")
        photo.crop((150, 0, 350, 150)).save(folder / "navy_hat_1.jpg")
    (folder / "grace hopper" / "IMG_2.txt").write_text("grace hopper with a flag\n")
    return folder


@pytest.fixture(scope="module")
def kosmos2(converted, tmp_path_factory) -> Path:
    return write_kosmos2(converted.mllm, tmp_path_factory.mktemp("public") / "kosmos-2")


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    return write_half_variant(TOY, tmp_path_factory.mktemp("public") / "sd-fp16")


def script(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", REPOSITORY / "examples" / "own_pictures.sh", *map(str, arguments)],
        # Were the package not found, the script would install it: not from here.
        env={**os.environ, "PIP_NO_INDEX": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_from_public_folders_and_photos_to_images(
    photos, kosmos2, half, tmp_path, preloaded_python
):
    search = f"{preloaded_python.venv / 'bin'}:{os.environ['PATH']}"
    inputs = (
        "--pictures",
        photos,
        "--kosmos2",
        kosmos2,
        "--sd",
        half,
        "--output",
        tmp_path / "out",
    )
    line = (*inputs, "--image-size", SIZE, "--", *SETTINGS)
    done = script(*line, PATH=search)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out = tmp_path / "out"
    drawn = sorted(path.name for path in (out / "drawn").glob("*.png"))
    assert [name for name in drawn if name.startswith("grace_hopper")] and len(drawn) >= 6
    assert CheckpointTensors(out / "instruct").stage == "instruct"
    subjects = json.loads((out / "data" / "subjects.json").read_text())
    assert subjects["num_samples"] == 3
    again = script(*line, PATH=search)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert f"Kosmos-2 as a checkpoint: {out}/kosmos2 is there" in again.stdout
    assert sorted(path.name for path in (out / "drawn").glob("*.png")) == drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pictures", "."), "--kosmos2 is missing"),
        (("--pictures", "nowhere", "--kosmos2", ".", "--sd", "."), "nowhere: no such folder"),
        (("--picture", "."), "unknown option: --picture"),
        (("--pictures",), "--pictures needs a value"),
        (("--pictures=.", "--kosmos2=.", f"--sd={TOY}", "--gpus=0"), "--gpus 0 is no number"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    ended = script(*arguments)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert message in ended.stderr


def test_names_and_texts_say_what_a_image_shows(photos):
    found = {each.path: (each.subject, each.caption) for each in describe(photos)}
    assert found == {
        "grace hopper/IMG_1.jpg": ("grace hopper", "a photo of grace hopper"),
        "grace hopper/IMG_2.jpg": ("grace hopper", "grace hopper with a flag"),
        "navy_hat_1.jpg": ("navy hat", "a photo of navy hat"),
    }


def test_images_that_nothing_names_are_refused(photos, tmp_path, capsys):
    shutil.copy(photos / "navy_hat_1.jpg", tmp_path / "IMG_20240101.jpg")
    code = main(["--pictures", str(tmp_path), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and "nothing says what 1 pictures show, such as IMG_20240101.jpg" in error
    assert not (tmp_path / "out").exists()


# Layouts of public folders


def test_a_half_variant_gives_the_full_ones_weights(half):
    frozen = [
        FrozenDiffusion.from_folder(folder, device=torch.device("cpu"), dtype=torch.float32)
        for folder in (TOY, half)
    ]
    full, variant = (each.unet.state_dict() for each in frozen)
    assert all(torch.equal(variant[name], value.half().float()) for name, value in full.items())


def test_an_export_refuses_pickles_with_the_command_that_converts_them(kosmos2, tmp_path):
    folder = write_pickles(TOY, tmp_path / "sd-bin")
    with pytest.raises(ConversionError, match=r"pickles \(.bin\) alone") as caught:
        StableDiffusion(folder, AlignerConfig(hidden_size=96, num_queries=21))
    assert f"P.from_pretrained('{folder}', use_safetensors=False" in str(caught.value)
    old = shutil.copytree(kosmos2, tmp_path / "kosmos2-bin")
    (old / "model.safetensors").rename(old / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"from_pretrained\('.*', use_safetensors=False\)"):
        import_kosmos2(old, tmp_path / "run")


def test_the_script_asks_for_safetensors_before_it_trains(tmp_path):
    folder = write_pickles(TOY, tmp_path / "sd-bin")
    ended = script("--pictures", tmp_path, "--kosmos2", tmp_path, "--sd", folder)
    assert ended.returncode == 2 and "unet has no safetensors files" in ended.stderr


def test_the_command_that_converts_pickles_gives_a_folder_that_is_read(tmp_path):
    """All but the safety checker, which no stand-in has."""
    from diffusers import StableDiffusionPipeline

    folder = write_pickles(TOY, tmp_path / "sd-bin")
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, use_safetensors=False, safety_checker=None
    )
    pipeline.save_pretrained(tmp_path / "NEW")
    StableDiffusion(tmp_path / "NEW", AlignerConfig(hidden_size=96, num_queries=21))


def test_a_whole_model_in_one_file_is_answered_with_the_command_that_makes_a_folder(tmp_path):
    file = tmp_path / "v1-5-pruned-emaonly.safetensors"
    file.touch()
    config = load_config("instruct_1gpu", [f"model.diffusion.path={file}"])
    with pytest.raises(ConfigError, match=r"model\.diffusion\.path=.* is one file") as caught:
        validate_files(config, stage_facts("instruct"))
    assert f"P.from_single_file('{file}'" in str(caught.value)
    with pytest.raises(ConversionError, match="is one file"):
        StableDiffusion(file, AlignerConfig())
