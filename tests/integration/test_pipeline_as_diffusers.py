"""KosmosGPipeline does what diffusers' own tests of pipelines ask of every pipeline."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks import apply_layerwise_casting

from tests.support.marks import skip_without_group_offload
from tests.support.public import KosmosGPipeline
from tests.support.tiny_pipeline import draw, prompt_image, tiny_pipeline

DOG, CAT = prompt_image(1), prompt_image(2, 31, 50)
PROMPT = ["A", DOG, "in snow"]
CPU = torch.device("cpu")
LANGUAGE_SIDE = ("mllm", "aligner", "tokenizer", "mllm_image_processor")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> KosmosGPipeline:
    """Nothing changes it."""
    torch.set_num_threads(1)
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory) -> Path:
    """What it saves."""
    folder = tmp_path_factory.mktemp("saved")
    shared.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(shared) -> torch.Tensor:
    return draw(shared, PROMPT)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def copied(pipeline, *parts: str) -> KosmosGPipeline:
    """Another pipeline, with its own copies of the named parts (of all, if none is named)."""
    copies = {
        name: copy.deepcopy(pipeline.components[name]) for name in parts or pipeline.components
    }
    return quiet(KosmosGPipeline(**{**pipeline.components, **copies}))


def condition(pipeline, prompt=PROMPT, **arguments) -> torch.Tensor:
    return pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, **arguments)[0]


def assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# Calls -----------------------------------------------------------------------------------------


def test_the_signature_is_stable_diffusions_with_images() -> None:
    """A newer diffusers that takes more makes this fail, so that it is shown here, too."""
    signature, stock_signature = (
        {
            name: list(p.default) if isinstance(p.default, (list, tuple)) else p.default
            for name, p in inspect.signature(kind.__call__).parameters.items()
        }
        for kind in (KosmosGPipeline, StableDiffusionPipeline)
    )
    assert signature.pop("images") is None
    del stock_signature["kwargs"]
    assert signature == stock_signature


def test_every_argument_reaches_stable_diffusion(shared, monkeypatch) -> None:
    passed = {}

    def record(self, **settings):
        passed.update(settings)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", record)
    read_here = {"prompt": "a", "images": None, "negative_prompt": None, "guidance_scale": 7.5}
    names = inspect.signature(KosmosGPipeline.__call__).parameters.keys() - read_here.keys()
    names -= {"self", "prompt_embeds", "negative_prompt_embeds"}
    marked = {name: f"a mark of {name}" for name in names}
    shared(**read_here, **marked)
    assert marked.items() <= passed.items() and passed["guidance_scale"] == 7.5
    assert passed["prompt_embeds"].shape == passed["negative_prompt_embeds"].shape


def test_a_batch_draws_what_its_prompts_draw_alone(shared, drawn) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    found = draw(shared, [PROMPT, "a red square", PROMPT], generator=generators)
    assert_close(found[:1], drawn)
    assert_close(found[1:2], draw(shared, "a red square"))
    assert (found[2:] - drawn).abs().max() > 1e-3


@pytest.mark.parametrize("count", [1, 3])
def test_images_of_a_prompt(shared, drawn, count: int) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2 * count)]
    settings = {"generator": generators, "num_images_per_prompt": count}
    found = draw(shared, [PROMPT, "a red square"], **settings)
    assert len(found) == 2 * count
    assert_close(found[:1], drawn)


def test_a_tuple_holds_what_the_output_holds(shared, drawn) -> None:
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    images, flags = shared(PROMPT, output_type="pt", return_dict=False, **settings)
    assert torch.equal(images, drawn) and flags is None


def test_given_latents_are_the_generators(shared, drawn) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    # The scheduler draws from the generator in every step, as after it drew the noise.
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 4, 8, 8, generator=generator)
    assert_close(draw(shared, PROMPT, latents=noise, generator=generator), drawn)


def test_callbacks_see_and_change_the_latents(shared, drawn) -> None:
    assert {"latents", "prompt_embeds"} <= set(shared._callback_tensor_inputs)

    def blank(pipeline, step: int, timestep, tensors: dict) -> dict:
        assert list(tensors) == ["latents"]
        if step == pipeline.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    found = draw(shared, PROMPT, output_type="latent", callback_on_step_end=blank)
    assert torch.count_nonzero(found) == 0
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    cut = draw(shared, PROMPT, num_inference_steps=4, callback_on_step_end=cutoff)
    assert (cut - draw(shared, PROMPT, num_inference_steps=4)).abs().max() > 1e-4
    assert_close(draw(shared, PROMPT), drawn)  # nothing of it stays


def test_a_callback_ends_the_drawing(shared) -> None:
    seen = []

    def stop(pipeline, step: int, timestep, tensors: dict) -> dict:
        seen.append(step)
        pipeline._interrupt = True
        return tensors

    draw(shared, PROMPT, num_inference_steps=4, callback_on_step_end=stop)
    assert seen == [0]


def test_guidance_of_one_and_less_is_none(shared) -> None:
    plain = draw(shared, PROMPT, guidance_scale=1.0)
    assert torch.equal(draw(shared, PROMPT, guidance_scale=0.0, negative_prompt="blue"), plain)
    assert_close(draw(shared, PROMPT, guidance_scale=1.0001), plain, atol=1e-3)


# Images as users have them ----------------------------------------------------------------------


def as_path(folder: Path) -> Path:
    DOG.save(folder / "dog.png")
    return folder / "dog.png"


def as_text(folder: Path) -> str:
    return str(as_path(folder))


def as_uint8(folder: Path) -> np.ndarray:
    return np.array(DOG)


def as_float(folder: Path) -> np.ndarray:
    return np.array(DOG, np.float32) / 255


def as_tensor(folder: Path) -> torch.Tensor:
    return torch.from_numpy(as_float(folder)).movedim(-1, 0)


def as_batch_of_one(folder: Path) -> torch.Tensor:
    return as_tensor(folder)[None]


FORMS = [as_path, as_text, as_uint8, as_float, as_tensor, as_batch_of_one]


@pytest.mark.parametrize("form", FORMS)
def test_an_image_may_have_another_form(shared, tmp_path, form) -> None:
    expected, image = condition(shared, "a <image>", images=DOG), form(tmp_path)
    assert torch.equal(condition(shared, "a <image>", images=image), expected)
    if form is not as_batch_of_one:
        assert torch.equal(condition(shared, "a <image>", images=[image]), expected)
    if form is not as_text and form is not as_batch_of_one:  # a string in a list is text
        assert torch.equal(condition(shared, ["a", image]), condition(shared, ["a", DOG]))


def test_an_array_of_images_is_one_for_each_placeholder(shared) -> None:
    pair = np.stack([np.array(DOG), np.array(DOG)[::-1]])
    found = condition(shared, "<image> and <image>", images=pair)
    turned = prompt_image(1).transpose(1)
    assert torch.equal(found, condition(shared, "<image> and <image>", images=[DOG, turned]))


def test_gray_and_transparent_arrays_are_what_their_images_are(shared) -> None:
    for mode in ("L", "RGBA"):
        image = DOG.convert(mode)
        found = condition(shared, ["a", np.array(image)])
        assert torch.equal(found, condition(shared, ["a", image]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no-such.png", "'no-such.png' cannot be read: .*No such file"),
        (b"bytes", "b'bytes' is no image: give a PIL image, a path"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\] and uint8: needed are \[h, w\]"),
        (np.zeros((8, 8, 3), np.int64), "and int64: needed are"),
        (2 * np.ones((8, 8, 3)), "and float64 with values outside of 0 to 1"),
        (np.full((8, 8, 3), np.nan), "outside of 0 to 1"),
        (torch.zeros(8, 8, 3), r"shape \[8, 3, 8\].*\(tensors: channels first"),
        (-torch.ones(3, 8, 8), "outside of 0 to 1"),
        ([DOG], r"\[<PIL.Image.* is no image"),
    ],
)
def test_what_is_no_image_is_named(shared, image, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"prompt 1: .*{message}"):
        shared("a <image>", images=[image])


# Other pipelines --------------------------------------------------------------------------------


def test_from_pipe_keeps_parts_and_image(shared, drawn) -> None:
    again = quiet(KosmosGPipeline.from_pipe(shared))
    assert all(part is shared.components[name] for name, part in again.components.items())
    assert torch.equal(draw(again, PROMPT), drawn)
    other = copy.deepcopy(shared.aligner)
    assert KosmosGPipeline.from_pipe(shared, aligner=other).aligner is other


@pytest.mark.parametrize(
    "kind",
    [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionControlNetPipeline],
)
def test_from_pipe_there_and_back(shared, drawn, kind) -> None:
    extra = {}
    if kind is StableDiffusionControlNetPipeline:
        channels = {"conditioning_embedding_out_channels": (4, 8)}
        extra = {"controlnet": ControlNetModel.from_unet(shared.unet, **channels)}
    stock = kind.from_pipe(shared, **extra)
    language = {name: getattr(shared, name) for name in LANGUAGE_SIDE}
    back = quiet(KosmosGPipeline.from_pipe(stock, **language))
    assert torch.equal(draw(back, PROMPT), drawn)
    with pytest.raises(ValueError, match="'mllm'"):
        KosmosGPipeline.from_pipe(stock)


# Offloading and casting -------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("aligner",), ("mllm",), ("aligner", "mllm", "unet", "vae")])
def test_sequential_offload(shared, drawn, parts: tuple[str, ...]) -> None:
    """What enable_sequential_cpu_offload does to each part, with the CPU for accelerator."""
    pipeline = copied(shared, *parts)
    for part in parts:
        cpu_offload(getattr(pipeline, part), CPU, offload_buffers=True)
        assert next(getattr(pipeline, part).parameters()).is_meta
    assert_close(draw(pipeline, PROMPT), drawn)
    assert_close(draw(pipeline, PROMPT), drawn)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(shared, drawn, tmp_path, kind: str, on_disk: bool) -> None:
    skip_without_group_offload()
    pipeline = copied(shared)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    disk = {"offload_to_disk_path": str(tmp_path)} if on_disk else {}
    pipeline.enable_group_offload(CPU, offload_type=kind, **blocks, **disk)
    assert_close(draw(pipeline, PROMPT), drawn)
    assert_close(condition(pipeline, PROMPT), condition(shared, PROMPT))


def test_layerwise_casting(shared) -> None:
    """Of the aligner by its own method, of the language model by diffusers' function."""
    pipeline = copied(shared).to(torch.bfloat16)
    expected, text = condition(pipeline), condition(pipeline, "a dog")
    store, compute = torch.float8_e4m3fn, torch.bfloat16
    pipeline.aligner.enable_layerwise_casting(store, compute)
    linear = pipeline.aligner.decoder.layers[0].ffn.fc1.weight
    norm = pipeline.aligner.decoder.layers[0].final_layer_norm.weight
    assert (linear.dtype, norm.dtype) == (store, compute)
    assert pipeline.aligner.positions.weight.dtype == compute
    assert_close(condition(pipeline), expected, atol=0.2 * expected.abs().max().item())
    apply_layerwise_casting(pipeline.mllm, store, compute)
    assert next(pipeline.mllm.parameters()).dtype == store
    for prompt, reference in ((PROMPT, expected), ("a dog", text)):
        found = condition(pipeline, prompt)
        assert found.dtype == compute
        assert_close(found, reference, atol=0.3 * reference.abs().max().item())


def test_another_dtype_for_each_part(folder, drawn) -> None:
    dtypes = {"mllm": torch.bfloat16, "default": torch.float32}
    pipeline = quiet(KosmosGPipeline.from_pretrained(folder, torch_dtype=dtypes))
    assert (pipeline.mllm.dtype, pipeline.aligner.dtype) == (torch.bfloat16, torch.float32)
    assert 0 < (draw(pipeline, PROMPT) - drawn).abs().max() < 0.1


@torch.no_grad()
def test_a_resampler_that_hides_patches_is_refused(shared, monkeypatch) -> None:
    """As with transformers before 5.23, were its fault not set right."""
    attention = type(shared.mllm.image_to_text_projection.x_attn)
    forward = attention.forward

    def causal(self, *inputs, **arguments):
        self.is_causal = True
        return forward(self, *inputs, **arguments)

    monkeypatch.setattr(attention, "forward", causal)
    with pytest.raises(RuntimeError, match="transformers .* hides patches .* README.md"):
        KosmosGPipeline(**{**shared.components, "mllm": copy.deepcopy(shared.mllm)})


# Folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ({"variant": "fp16"}, {"variant": "fp16"}),
        ({"safe_serialization": False}, {}),
        ({"max_shard_size": "20KB"}, {"low_cpu_mem_usage": False}),
        ({}, {"device_map": "cpu"}),
    ],
)
def test_ways_to_save_and_load(shared, drawn, tmp_path, saving: dict, loading: dict) -> None:
    shared.save_pretrained(tmp_path, **saving)
    again = quiet(KosmosGPipeline.from_pretrained(tmp_path, **loading))
    assert_close(draw(again, PROMPT), drawn)  # bits depend on where weights lie


@pytest.mark.parametrize("left_out", [LANGUAGE_SIDE, ("mllm",), ("tokenizer", "aligner")])
def test_optional_parts_stay_out(shared, drawn, tmp_path, left_out: tuple[str, ...]) -> None:
    embeds, negative = shared.encode_prompt(PROMPT)
    light = KosmosGPipeline(**{**shared.components, **dict.fromkeys(left_out)})
    light.save_pretrained(tmp_path)
    again = quiet(KosmosGPipeline.from_pretrained(tmp_path))
    absent = {name for name in LANGUAGE_SIDE if getattr(again, name) is None}
    assert absent == set(left_out) and not [n for n in left_out if (tmp_path / n).exists()]
    found = draw(again, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert torch.equal(found, drawn)
    with pytest.raises(ValueError, match=f"has no .*{left_out[0]}.*give `prompt_embeds`"):
        again("a dog")


def test_parts_may_be_left_out_of_a_load(folder, shared, drawn) -> None:
    light = quiet(KosmosGPipeline.from_pretrained(folder, **dict.fromkeys(LANGUAGE_SIDE)))
    embeds, negative = shared.encode_prompt(PROMPT)
    assert torch.equal(draw(light, prompt_embeds=embeds, negative_prompt_embeds=negative), drawn)


def test_a_tokenizer_is_saved_as_it_is_exported(shared, folder) -> None:
    exported = Path(shared.tokenizer.name_or_path)
    assert names_in(folder / "tokenizer") == names_in(exported)
    for name in names_in(exported):
        assert (folder / "tokenizer" / name).read_bytes() == (exported / name).read_bytes(), name


def test_the_model_card_stays(folder, tmp_path) -> None:
    """Of a pipeline's folder; a README.md elsewhere beside a tokenizer is another thing."""
    KosmosGPipeline.from_pretrained(folder).save_pretrained(tmp_path / "first")
    assert not (tmp_path / "first" / "README.md").exists()
    (tmp_path / "first" / "README.md").write_text("what it is")
    KosmosGPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_text() == "what it is"
    tokenizer = KosmosGPipeline.from_pretrained(tmp_path / "first").tokenizer
    (tmp_path / "first" / "model_index.json").unlink()
    parts = KosmosGPipeline.from_pretrained(folder).components
    KosmosGPipeline(**{**parts, "tokenizer": tokenizer}).save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third" / "README.md").exists()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def with_linked_model(folder: Path, out: Path, target: str) -> KosmosGPipeline:
    """A folder whose SentencePiece model is a link, loaded."""
    KosmosGPipeline.from_pretrained(folder).save_pretrained(out)
    path = out / "tokenizer" / "sentencepiece.bpe.model"
    path.rename(out / "elsewhere")
    path.symlink_to(target)
    return KosmosGPipeline.from_pretrained(out)


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path) -> None:
    pipeline = with_linked_model(folder, tmp_path / "linked", "../elsewhere")
    (tmp_path / "linked" / "tokenizer" / "notes.txt").write_text("private")
    pipeline.save_pretrained(tmp_path / "saved")
    names = names_in(tmp_path / "saved" / "tokenizer")
    assert names == {"tokenizer.json", "tokenizer_config.json"}


def test_a_hubs_cache_is_followed_into_its_blobs(folder, tmp_path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x/snapshots/1a2b"
    blobs.mkdir(parents=True)
    pipeline = with_linked_model(folder, snapshot, "../../../blobs/77")
    (snapshot / "elsewhere").rename(blobs / "77")
    pipeline.save_pretrained(tmp_path / "saved")
    copied_model = tmp_path / "saved" / "tokenizer" / "sentencepiece.bpe.model"
    assert copied_model.read_bytes() == (blobs / "77").read_bytes()


def test_saving_over_the_folder_it_came_from(folder, drawn, tmp_path) -> None:
    KosmosGPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    KosmosGPipeline.from_pretrained(tmp_path).save_pretrained(tmp_path)
    again = quiet(KosmosGPipeline.from_pretrained(tmp_path))
    assert names_in(tmp_path / "tokenizer") == names_in(folder / "tokenizer")
    assert_close(draw(again, PROMPT), drawn)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index == json.loads((folder / "model_index.json").read_text())
