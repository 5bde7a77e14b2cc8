"""tools/generate.py on an export and on its checkpoint, against the pipeline itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from megatron_kosmosg.conversion.checkpoint_writer import model_tensors, write_checkpoint
from megatron_kosmosg.conversion.export_hf import export_hf
from megatron_kosmosg.conversion.tensors import InMemory
from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline
from megatron_kosmosg.inference.from_checkpoint import pipeline_from_checkpoint
from megatron_kosmosg.inference.trained_model import TrainedModel, single_process
from megatron_kosmosg.toy import assets
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion
from tests.support.tiny_pipeline import prompt_image
from tools import generate

DRAWING = ("--steps", "4", "--guidance-scale", "3", "--scheduler", "dpm++")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """`run/` (random weights), `exported/`, `sd/`, images and `prompts.jsonl`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("generate")
    sd = write_stable_diffusion(folder / "sd")
    config = tiny_config("instruct", sd, folder / "run")
    config = replace_section(config, "model", vocab_size=327)
    spm = str(assets.path() / "sentencepiece.model")
    # DALI resizes a little otherwise, and here the two paths must agree to rounding.
    data = {"tokenizer_model": spm, "seq_length": 48, "image_backend": "pillow"}
    config = replace_section(config, "data", **data)
    generator = torch.Generator().manual_seed(11)
    tensors = {
        # Norms near one: random ones blow up rounding errors.
        name: torch.randn(shape, generator=generator) * 0.2
        + (len(shape) == 1 and name.endswith("weight"))
        for name, shape in model_tensors(config).items()
    }
    write_checkpoint(folder / "run" / "checkpoints", config, InMemory(tensors))
    export_hf(folder / "run", sd, folder / "exported")
    for number, name in enumerate(("cat", "dog"), start=1):
        prompt_image(number).save(folder / f"{name}.png")
    records = [
        {"id": "plain", "prompt": "a red circle"},
        {"id": "cat", "prompt": "<image> on red", "images": ["cat.png"], "seed": 5},
        {
            "id": "both",
            "content": [{"image": "cat.png"}, {"text": "and a"}, {"image": "dog.png"}],
            "negative_prompt": "blue",
            "num_images": 2,
        },
        {"id": "small", "prompt": "a cross", "height": 8, "width": 24, "guidance": 1},
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="module")
def pipeline(files) -> KosmosGPipeline:
    pipeline = KosmosGPipeline.from_pretrained(files / "exported")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return pipeline


@pytest.fixture(scope="module")
def drawn(files) -> Path:
    """The images of `prompts.jsonl` from the export."""
    assert draw(files, files / "drawn") == 0
    return files / "drawn"


def draw(files: Path, output: Path, *more: str, model: str = "exported") -> int:
    arguments = ("--prompts", str(files / "prompts.jsonl"), "--output", str(output))
    return generate.main(["--model", str(files / model), *arguments, *DRAWING, *more])


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def seed_of(path: Path) -> int:
    with Image.open(path) as image:
        return int(image.info["seed"])


def drawn_by(pipeline, prompt, seed: int, **settings) -> np.ndarray:
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0} | settings
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline(prompt, generator=generator, **settings).images[0])


def test_images_are_the_pipelines_own(files, drawn, pipeline):
    cat, dog = prompt_image(1), prompt_image(2)
    found = pixels(drawn)
    assert list(found) == [
        "both-0.png",
        "both-1.png",
        "cat-0.png",
        "contact_sheet.png",
        "plain-0.png",
        "small-0.png",
    ]
    assert seed_of(drawn / "cat-0.png") == 5
    assert np.array_equal(found["cat-0.png"], drawn_by(pipeline, [cat, "on red"], 5))
    seed = seed_of(drawn / "plain-0.png")
    assert np.array_equal(found["plain-0.png"], drawn_by(pipeline, "a red circle", seed))
    seeds = [seed_of(drawn / f"both-{i}.png") for i in range(2)]
    assert seeds[1] == seeds[0] + 1
    both = pipeline(
        [cat, "and a", dog],
        negative_prompt="blue",
        num_inference_steps=4,
        guidance_scale=3.0,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    for i in range(2):
        assert np.array_equal(found[f"both-{i}.png"], np.asarray(both[i]))
    seed = seed_of(drawn / "small-0.png")
    small = drawn_by(pipeline, "a cross", seed, guidance_scale=1.0, height=8, width=24)
    assert np.array_equal(found["small-0.png"], small)


def test_a_checkpoint_draws_what_its_export_draws(files, drawn, capsys):
    assert draw(files, files / "direct", model="run") == 0
    direct = pixels(files / "direct")
    assert all(np.array_equal(direct[name], image) for name, image in pixels(drawn).items())
    assert "5 drawn, 0 kept" in capsys.readouterr().out


def test_the_pipeline_of_a_checkpoint_has_the_trained_models_conditions(files):
    prompts = [
        [prompt_image(1), "on red"],
        ["a", prompt_image(2), "and a", prompt_image(1)],
        ["a cross"],
        [],
    ]
    cpu = torch.device("cpu")
    pipeline = pipeline_from_checkpoint(files / "run", files / "sd", torch.float32, cpu)
    found, null = pipeline.encode_prompt(prompts)
    config = tiny_config("instruct", files / "sd", files / "run")
    with single_process(config) as context:
        expected, wanted_null = TrainedModel(files / "run", context).conditions(prompts)
    close = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(null[:1], wanted_null, **close)


def test_ranks_write_the_files_of_one_rank_and_nothing_is_drawn_twice(
    files, drawn, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    for rank in range(3):
        assert not (files / "ranks" / "contact_sheet.png").exists()
        monkeypatch.setenv("RANK", str(rank))
        assert draw(files, files / "ranks") == 0
    for name in pixels(drawn):
        assert (files / "ranks" / name).read_bytes() == (drawn / name).read_bytes()
    capsys.readouterr()
    monkeypatch.undo()
    assert draw(files, files / "ranks") == 0
    assert "0 drawn, 5 kept" in capsys.readouterr().out


def test_prompts_drawn_together_differ_by_rounding_only(files, drawn):
    assert draw(files, files / "batched", "--batch-size", "3") == 0
    for name, image in pixels(files / "batched").items():
        difference = image.astype(int) - pixels(drawn)[name]
        assert name == "contact_sheet.png" or np.abs(difference).max() <= 1


def test_an_export_draws_with_another_stable_diffusion(files, pipeline, capsys):
    shutil.copytree(files / "sd", files / "other-sd")
    path = files / "other-sd" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 0.9 * value for name, value in load_file(path).items()}, path)
    arguments = ["--prompt", "a cross", "--stable-diffusion", str(files / "other-sd"), *DRAWING]
    arguments += ["--output", str(files / "swapped"), "--sheet-rows", "0"]
    assert generate.main(["--model", str(files / "exported"), *arguments]) == 0
    (found,) = pixels(files / "swapped").values()
    unet = UNet2DConditionModel.from_pretrained(files / "other-sd" / "unet")
    swapped = KosmosGPipeline(**{**pipeline.components, "unet": unet})
    swapped.set_progress_bar_config(disable=True)
    assert np.array_equal(found, drawn_by(swapped, "a cross", 0))
    assert not np.array_equal(found, drawn_by(pipeline, "a cross", 0))

    shutil.copytree(files / "exported", files / "sizeless")
    settings = files / "sizeless" / "aligner" / "config.json"
    settings.write_text(settings.read_text().replace("num_queries", "queries"))
    assert generate.main(["--model", str(files / "sizeless"), *arguments, "--seed", "1"]) == 2
    assert "config.json has no num_queries" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("ddim", DDIMScheduler), ("euler", EulerDiscreteScheduler), ("pndm", PNDMScheduler)],
)
def test_schedulers(files, pipeline, name, scheduler):
    output = files / name
    arguments = ["--model", str(files / "exported"), "--output", str(output), "--seed", "3"]
    arguments += ["--prompt", "a <image> here", "--image", str(files / "cat.png")]
    assert generate.main([*arguments, *DRAWING, "--scheduler", name]) == 0
    (found,) = (image for file, image in pixels(output).items() if file.endswith("-0.png"))
    other = KosmosGPipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    settings = {"skip_prk_steps": True} if name == "pndm" else {}
    other.scheduler = scheduler.from_config(pipeline.scheduler.config, **settings)
    assert np.array_equal(found, drawn_by(other, ["a", prompt_image(1), "here"], 3))


def test_a_controlnet(files, pipeline):
    torch.manual_seed(2)
    controlnet = ControlNetModel.from_unet(
        pipeline.unet, conditioning_embedding_out_channels=(4, 8)
    )
    for parameter in controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    controlnet.save_pretrained(files / "controlnet")
    arguments = ["--model", str(files / "exported"), "--prompt", "a cross", *DRAWING]
    arguments += ["--output", str(files / "additions")]
    control = ["--controlnet", str(files / "controlnet"), "--control-scale", "0.5"]
    assert generate.main([*arguments, *control, "--control-image", str(files / "cat.png")]) == 0
    embeds, negative = pipeline.encode_prompt("a cross")
    names = ("vae", "tokenizer", "unet", "scheduler")
    stock = StableDiffusionControlNetPipeline(
        **{name: pipeline.components[name] for name in names},
        text_encoder=None,
        controlnet=controlnet.eval(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        image=prompt_image(1),
        num_inference_steps=4,
        guidance_scale=3.0,
        controlnet_conditioning_scale=0.5,
        generator=torch.Generator().manual_seed(0),
        height=32,
        width=40,
    ).images[0]
    (found,) = (i for name, i in pixels(files / "additions").items() if name.endswith("-0.png"))
    assert np.array_equal(found, np.asarray(expected))


def test_start_images_drawn_together_are_what_diffusers_draws_of_each(files, pipeline):
    settings = {"prompt": "a cross", "num_images": 2, "strength": 0.5, "height": 16, "width": 24}
    starts = {"from-cat": "cat.png", "from-dog": "dog.png"}
    records = [
        {"id": name, "start_image": file, "seed": 5, **settings} for name, file in starts.items()
    ]
    (files / "starts.jsonl").write_text("\n".join(map(json.dumps, records)))
    arguments = ["--prompts", str(files / "starts.jsonl"), "--output", str(files / "started")]
    model = ["--model", str(files / "exported"), "--batch-size", "2", "--sheet-rows", "0"]
    assert generate.main([*model, *arguments, *DRAWING]) == 0
    found = pixels(files / "started")
    names = ("vae", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")
    stock = StableDiffusionImg2ImgPipeline(
        **{name: pipeline.components[name] for name in names},
        text_encoder=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    embeds, negative = pipeline.encode_prompt("a cross")
    for name, file in starts.items():
        for index in range(2):
            expected = stock(
                prompt_embeds=embeds,
                negative_prompt_embeds=negative,
                image=ImageOps.fit(Image.open(files / file).convert("RGB"), (24, 16)),
                strength=0.5,
                num_inference_steps=4,
                guidance_scale=3.0,
                generator=torch.Generator().manual_seed(5 + index),
            ).images[0]
            off = np.abs(
                found[f"{name}-{index}.png"].astype(int) - np.asarray(expected).astype(int)
            )
            assert off.max() <= 1, "rounding of a batch"


def test_loras(files):
    unet = UNet2DConditionModel.from_pretrained(files / "sd" / "unet")
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        files / "lora", unet_lora_layers=get_peft_model_state_dict(unet)
    )
    lora = str(files / "lora" / "pytorch_lora_weights.safetensors")
    arguments = ["--model", str(files / "exported"), "--prompt", "a cross", *DRAWING]
    found = []
    for number, more in enumerate(
        (
            [],
            ["--lora", lora, "--lora-scale", "0"],
            ["--lora", lora],
            ["--lora", lora, "--lora-scale", "0.25", "--lora", lora, "--lora-scale", "0.75"],
        )
    ):
        output = files / f"lora-{number}"
        assert generate.main([*arguments, *more, "--output", str(output), "--sheet-rows", "0"]) == 0
        (image,) = pixels(output).values()
        found.append(image.astype(int))
    assert np.array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 3
    assert np.abs(found[2] - found[3]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a <image>"], "1 <image> in the prompt but 0 image"),
        (["--prompt", "a <image>", "--image", "none.png"], "no image none.png"),
        (["--content", "[5]"], "a content entry is"),
        (["--content", "{"], "--content is not JSON"),
        (["--prompts", "none.jsonl"], "no file none.jsonl"),
        (["--prompts", "{files}/cat.png"], "cannot be read"),
        (["--prompt", "a", "--model", "none"], "no exported folder.*no finished checkpoint"),
        (
            ["--prompt", "a", "--model", "{files}/run", "--stable-diffusion", "none"],
            "no Stable Diffusion folder",
        ),
        (["--prompt", "a", "--lora", "none"], "--lora none: no such file"),
        (["--prompt", "a", "--controlnet", "none"], "--controlnet none: no config.json"),
        (["--prompt", "a", "--controlnet", "{files}/sd/unet"], "needs a control image"),
        (["--prompt", "a", "--output", "{files}/cat.png"], "cat.png is a file; give a folder"),
        (["--prompt", "a", "--device", "abacus"], "--device abacus: "),
        (["--prompt", "a", "--height", "12"], "height 12 is not a multiple of 8"),
        (["--prompt", "red " * 50], "the prompt takes 51 positions"),
        (["--prompt", "a", "--negative-prompt", "red " * 50], "negative prompt takes 51 positions"),
        (["--prompt", "a", "--lora", "{files}/cat.png"], "--lora .*cat.png cannot be opened"),
        (["--prompt", "a", "--model", "{files}/truncated"], "no whole safetensors file"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(files, capsys, arguments, message):
    truncate(files / "exported", files / "truncated")
    if "--model" not in arguments:
        arguments = [*arguments, "--model", "{files}/exported"]
    output = files / "bad"
    filled = [argument.replace("{files}", str(files)) for argument in arguments]
    assert generate.main(["--output", str(output), *filled]) == 2
    stderr = capsys.readouterr().err
    assert re.search(message, stderr) and stderr.count("error: ") == 1, stderr
    assert not output.exists()


@pytest.mark.parametrize("weights", ["mllm/model", "aligner/diffusion_pytorch_model"])
def test_a_weight_that_is_missing_is_not_drawn_at_random(files, tmp_path, capsys, weights):
    shutil.copytree(files / "exported", tmp_path / "model")
    path = tmp_path / "model" / f"{weights}.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert generate.main([*arguments, "--prompt", "a", *DRAWING]) == 2
    stderr = capsys.readouterr().err
    assert "is no whole" in stderr and name in stderr
    assert not (tmp_path / "out").exists()


def truncate(source: Path, target: Path) -> None:
    """A copy of an export whose language model was not copied to its end."""
    if target.exists():
        return
    shutil.copytree(source, target)
    weights = target / "mllm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--prompts", "b"], "not allowed with"),
        (["--content", "[]", "--image", "b"], "--image belongs to --prompt"),
        (["--prompt", "a", "--lora", "b", "--lora-scale", "1", "--lora-scale", "2"], "2 --lora-sc"),
        (["--prompt", "a", "--control-image", "b"], "needs --controlnet"),
        (["--prompt", "a", "--num-images", "0"], "0 is not a whole number from 1"),
        (["--prompt", "a", "--guidance-scale", "nan"], "nan is not a number"),
    ],
)
def test_options_that_contradict(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--model", "m", "--output", "o", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
