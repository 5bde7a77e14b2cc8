"""KosmosGPipeline: what it makes of prompts, and that the rest is Stable Diffusion's own."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers import Kosmos2ForConditionalGeneration

from megatron_kosmosg.data.image_types import ImageTransform
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.sequence import SequenceFormat
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline
from megatron_kosmosg.inference.trained_model import build_prompt
from megatron_kosmosg.toy import assets
from tests.support.tiny_models import CONDITION_WIDTH, NUM_LATENT_QUERIES, NUM_QUERIES, TARGET_SIZE
from tests.support.tiny_pipeline import IMAGE_SIZE, draw, mllm_config, prompt_image, tiny_pipeline

DOG, CAT, HAT = prompt_image(1), prompt_image(2, 31, 50), prompt_image(3, 90, 47)
CLOSE = {"rtol": 0, "atol": 3e-6}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> KosmosGPipeline:
    torch.set_num_threads(1)
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def warnings(caplog):
    """What diffusers logs, which does not reach the root logger by itself."""
    diffusers_logging.enable_propagation()
    yield caplog
    diffusers_logging.disable_propagation()


def condition(pipeline, prompt, **arguments) -> torch.Tensor:
    return pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, **arguments)[0]


def test_the_resampler_sees_all_patches_with_older_transformers_too(pipeline) -> None:
    """Before 5.23 its attention said is_causal=True, which sdpa obeys without a word."""
    expected = condition(pipeline, [DOG])
    attention = pipeline.mllm.image_to_text_projection.x_attn
    attention.is_causal = True
    assert (condition(pipeline, [DOG]) - expected).abs().max() > 0.01
    again = KosmosGPipeline(**pipeline.components)
    assert attention.is_causal is False
    torch.testing.assert_close(condition(again, [DOG]), expected, rtol=0, atol=0)


def test_older_diffusers_can_read_the_types_of_its_parts() -> None:
    """Before 0.37 it takes classes only, no text; `from_pretrained` then raises KeyError."""
    parameters = inspect.signature(KosmosGPipeline.__init__).parameters.values()
    assert not [p.name for p in parameters if isinstance(p.annotation, str)]


@pytest.mark.parametrize(
    "parts",
    [
        ["A", DOG, "and", CAT, "in the snow"],
        [DOG],
        [DOG, CAT],
        ["a red square."],
        ["a <image> here", DOG, "<s> </s> </image> x"],
        ["", DOG, "   ", "two", "texts"],
        [],
    ],
)
def test_a_prompt_has_the_tokens_of_training(pipeline, parts) -> None:
    tokenizer = Tokenizer(assets.path() / "sentencepiece.model")
    expected = build_prompt(parts, SequenceFormat(tokenizer, NUM_LATENT_QUERIES))
    tokens, slots = pipeline.prompt_tokens(parts)
    assert tokens == expected.tokens.tolist()
    assert slots == expected.image_mask.tolist()


def test_images_have_the_pixels_of_training(pipeline) -> None:
    processor = pipeline.mllm_image_processor
    transform = ImageTransform(
        IMAGE_SIZE, "bicubic", tuple(processor.image_mean), tuple(processor.image_std)
    )
    grey = DOG.convert("L")
    encoded = [p.images[0] for p in (build_prompt([d], format_of()) for d in (DOG, CAT, HAT, grey))]
    expected = ImageDecoder("pillow").decode(encoded, transform).numpy()
    found = pipeline._pixels([["x", DOG, CAT], [], [HAT, grey]], torch.device("cpu"))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


def format_of() -> SequenceFormat:
    return SequenceFormat(Tokenizer(assets.path() / "sentencepiece.model"), NUM_LATENT_QUERIES)


def test_both_forms_of_a_prompt_give_the_same(pipeline) -> None:
    as_list = condition(pipeline, ["A", DOG, "and", CAT, "in snow"])
    as_text = condition(pipeline, "A <image> and <image> in snow", images=[DOG, CAT])
    assert as_list.shape == (1, NUM_QUERIES, CONDITION_WIDTH)
    assert torch.equal(as_list, as_text)
    assert torch.equal(condition(pipeline, "<image>", images=DOG), condition(pipeline, [DOG]))
    swapped = condition(pipeline, ["A", CAT, "and", DOG, "in snow"])
    assert (swapped - as_list).abs().max() > 1e-3


def test_a_ragged_batch_equals_its_rows_alone(pipeline) -> None:
    batch = ["<image> beside <image>", ["a", HAT], "a red square", ["literal <image>"]]
    found = condition(pipeline, batch, images=[[DOG, CAT], None, [], None])
    alone = [
        condition(pipeline, [DOG, "beside", CAT]),
        condition(pipeline, ["a", HAT]),
        condition(pipeline, "a red square"),
        condition(pipeline, [["literal <image>"]]),
    ]
    torch.testing.assert_close(found, torch.cat(alone), **CLOSE)
    flat = condition(pipeline, ["<image> x", "<image> x"], images=[DOG, CAT])
    torch.testing.assert_close(flat[1:], condition(pipeline, [CAT, "x"]), **CLOSE)


@torch.no_grad()
def test_the_condition_is_the_language_models_states_through_the_aligner(pipeline) -> None:
    """Against stock Kosmos-2 driven by its lower-level parts."""
    parts = ["A", DOG, "x", CAT]
    tokens, slots = (torch.tensor([row]) for row in pipeline.prompt_tokens(parts))
    mllm = pipeline.mllm
    pixels = pipeline._pixels([parts], torch.device("cpu"))
    features = mllm.vision_model(pixels)[0]
    features = torch.nn.functional.normalize(
        mllm.vision_model.model.post_layernorm(features), dim=-1
    )
    images, _ = mllm.image_to_text_projection(features)
    states = mllm.text_model.model(
        input_ids=tokens, image_embeds=images, image_embeds_position_mask=slots
    ).last_hidden_state
    expected = pipeline.aligner(states, torch.zeros_like(slots))
    torch.testing.assert_close(condition(pipeline, parts), expected, **CLOSE)


@torch.no_grad()
def test_the_negative_is_a_text_or_the_empty_prompt(pipeline) -> None:
    def through_both(tokens: list[int]) -> torch.Tensor:
        states = pipeline.mllm.text_model.model(input_ids=torch.tensor([tokens])).last_hidden_state
        return pipeline.aligner(states, torch.zeros(1, len(tokens), dtype=torch.bool))

    prompts = ["a dog", "two cats"]
    blurry = [0, *Tokenizer(assets.path() / "sentencepiece.model").encode("blue circle")]
    _, null = pipeline.encode_prompt(prompts)
    torch.testing.assert_close(null, through_both([0]).expand(2, -1, -1), **CLOSE)
    _, same = pipeline.encode_prompt(prompts, negative_prompt="")
    assert torch.equal(same, null)
    _, one = pipeline.encode_prompt(prompts, negative_prompt="blue circle")
    torch.testing.assert_close(one, through_both(blurry).expand(2, -1, -1), **CLOSE)
    _, each = pipeline.encode_prompt(prompts, negative_prompt=["", "blue circle"])
    torch.testing.assert_close(each, torch.cat([null[:1], one[:1]]), **CLOSE)
    assert pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)[1] is None


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_stock_stable_diffusion_draws_the_same(pipeline, guidance_scale: float) -> None:
    """Bit-equal from the embeddings on, with several images of each prompt."""
    prompts = [["A", DOG], "a red square"]
    settings = {"guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    found = draw(pipeline, prompts, generator=generators, negative_prompt="blue", **settings)
    stock = StableDiffusionPipeline(
        pipeline.vae, None, pipeline.tokenizer, pipeline.unet, pipeline.scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    stock.set_progress_bar_config(disable=True)
    embeds, negative = pipeline.encode_prompt(prompts, negative_prompt="blue")
    expected = draw(
        stock,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        generator=[torch.Generator().manual_seed(i) for i in range(4)],
        **settings,
    )
    assert torch.equal(found, expected)
    assert found.shape == (4, 3, TARGET_SIZE, TARGET_SIZE)
    assert (found[0] - found[1]).abs().max() > 1e-3
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    from_embeds = {"prompt_embeds": embeds, "negative_prompt": "blue", "generator": generators}
    again = draw(pipeline, **from_embeds, **settings)
    assert torch.equal(found, again)


def test_guidance_and_negative_change_the_image(pipeline) -> None:
    plain = draw(pipeline, [DOG, "x"])
    assert (draw(pipeline, [DOG, "x"], guidance_scale=2.0) - plain).abs().max() > 1e-4
    assert (draw(pipeline, [DOG, "x"], negative_prompt="blue") - plain).abs().max() > 1e-4
    assert torch.equal(draw(pipeline, [DOG, "x"]), plain)


def test_diffusers_own_arguments(pipeline) -> None:
    seen = []

    def watch(_, step, timestep, tensors):
        seen.append((step, sorted(tensors), tensors["prompt_embeds"].shape[0]))
        return tensors

    images, flags = pipeline(
        "a dog", num_inference_steps=3, height=24, width=40, return_dict=False,
        callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )  # fmt: skip
    assert images[0].size == (40, 24) and flags is None
    assert seen == [(step, ["latents", "prompt_embeds"], 2) for step in range(3)]
    assert draw(pipeline, "a dog", output_type="latent").shape == (1, 4, 8, 8)
    assert draw(pipeline, "a dog", output_type="np").shape == (1, TARGET_SIZE, TARGET_SIZE, 3)


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ("a <image> b", None, "1 <image> placeholders, but 0 images"),
        ("a dog", [DOG], "0 <image> placeholders, but 1 images"),
        (["<image>", "<image> and <image>"], [[DOG], [CAT]], "prompt 2 has 2 .* but 1 images"),
        (["a", "b"], [DOG], "2 prompts, but 1 entries in `images`"),
        ([DOG, "x"], [CAT], "holds its images"),
        ([DOG] * 6, None, "prompt 1 takes 43 positions .7 an image., this model has 40"),
        (["a", [DOG] * 6], None, "prompt 2 takes 43 positions"),
        ("<image>", ["dog.png"], "'dog.png' cannot be read"),
        ([DOG, 3], None, "3 is no image"),
        (["a", None], None, "prompt 2: None is no image"),
        ([], None, r"a string or a list, not \[\]"),
        ({"a": 1}, None, "a string or a list, not"),
        (None, None, "give either `prompt` or `prompt_embeds`"),
    ],
)
def test_bad_prompts_are_refused(pipeline, prompt, images, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pipeline(prompt, images=images)


def test_an_unreadable_image_is_named(pipeline, tmp_path) -> None:
    path = tmp_path / "cut.png"
    HAT.save(path)
    path.write_bytes(path.read_bytes()[:-150])
    with pytest.raises(ValueError, match="image 2 of prompt 1 cannot be read: .*truncated"):
        pipeline([DOG, "x", Image.open(path)])


def test_other_bad_arguments_are_refused(pipeline) -> None:
    embeds, _ = pipeline.encode_prompt("a dog")
    cases = [
        ({"prompt": "a <image>", "image": DOG}, TypeError, "argument 'image'"),
        ({"prompt": "a", "prompt_embeds": embeds}, ValueError, "either `prompt` or"),
        ({"prompt_embeds": embeds, "images": [DOG]}, ValueError, "have read theirs"),
        ({"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": embeds}, ValueError,
         "either `negative_prompt`"),
        ({"prompt": "a", "negative_prompt": ["b", "c"]}, ValueError, "2 negative prompts for 1"),
        ({"prompt": "a", "negative_prompt": [DOG]}, TypeError, "has no images"),
        ({"prompt": "a", "height": 13, "width": 16}, ValueError, "divisible by 8"),
    ]  # fmt: skip
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            pipeline(**arguments)


def test_clips_own_features_are_ignored_with_a_warning(pipeline, warnings) -> None:
    plain = draw(pipeline, "a dog")
    assert torch.equal(draw(pipeline, "a dog", clip_skip=2), plain)
    assert "clip_skip is ignored" in warnings.text
    pipeline.load_textual_inversion("some/concept")
    assert "textual inversion is ignored" in warnings.text


def test_models_are_in_eval_mode(pipeline) -> None:
    """A language model built in a program is in train mode and has dropout."""
    parts = {**pipeline.components, "mllm": Kosmos2ForConditionalGeneration(mllm_config(327))}
    assert parts["mllm"].training and parts["mllm"].config.text_config.dropout > 0
    built = KosmosGPipeline(**parts)
    assert torch.equal(condition(built, ["A", DOG]), condition(built, ["A", DOG]))


def test_parts_that_do_not_fit_are_refused(pipeline, tmp_path) -> None:
    wrong = type(pipeline.unet).from_config({**pipeline.unet.config, "cross_attention_dim": 20})
    with pytest.raises(ValueError, match=f"width 20, the aligner makes {CONDITION_WIDTH}"):
        KosmosGPipeline(**{**pipeline.components, "unet": wrong})
    mllm = Kosmos2ForConditionalGeneration(mllm_config(300))
    with pytest.raises(ValueError, match="tokenizer knows 327 tokens, the language model 300"):
        KosmosGPipeline(**{**pipeline.components, "mllm": mllm})


def test_it_draws_from_embeddings_without_the_language_model(pipeline) -> None:
    embeds, negative = pipeline.encode_prompt(["A", DOG])
    light = KosmosGPipeline(**{**pipeline.components, "mllm": None, "aligner": None})
    light.set_progress_bar_config(disable=True)
    found = draw(light, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert torch.equal(found, draw(pipeline, ["A", DOG]))
    with pytest.raises(ValueError, match="give `prompt_embeds`"):
        draw(light, "a dog")
