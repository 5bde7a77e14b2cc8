"""The captioning example against greedy and beam search written out, with several pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, Kosmos2Config, Kosmos2ForConditionalGeneration

from megatron_kosmosg.conversion.hf_tokenizer import write_tokenizer
from megatron_kosmosg.toy import assets

EXAMPLE = Path(__file__).parents[2] / "examples" / "inference" / "caption_image.py"
SLOTS, LENGTH, BEAMS = 3, 4, 3


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write_tokenizer(assets.path() / "sentencepiece.model", folder / "tokenizer", 64)
    text = {
        "vocab_size": 327,
        "embed_dim": 24,
        "layers": 2,
        "ffn_dim": 40,
        "attention_heads": 4,
        "max_position_embeddings": 64,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Kosmos2Config(text_config=text, vision_config=vision, latent_query_num=SLOTS)
    torch.manual_seed(4)
    model = Kosmos2ForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder / "mllm")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**size).save_pretrained(folder / "mllm_image_processor")
    specification = importlib.util.spec_from_file_location("caption_image", EXAMPLE)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    return example.Captioner(folder)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(2)]


@torch.no_grad()
def search(captioner, prompt: torch.Tensor, beams: int) -> list[list[int]]:
    """The best sequences of LENGTH tokens, every step computed from the whole sequence."""
    model, eos = captioner.model, captioner.tokenizer.eos_token_id
    embedding = model.text_model.get_input_embeddings()
    found = [(0.0, [])]
    for _ in range(LENGTH):
        longer = []
        for score, ids in found:
            words = embedding(torch.tensor(ids, dtype=torch.long))[None]
            logits = model.text_model(inputs_embeds=torch.cat([prompt, words], dim=1)).logits
            steps = logits[0, -1].log_softmax(-1)
            steps[eos] = -torch.inf
            best = steps.topk(beams)
            longer += [
                (score + float(value), [*ids, int(index)])
                for value, index in zip(best.values, best.indices, strict=True)
            ]
        found = sorted(longer, reverse=True)[:beams]
    return [ids for _, ids in found]


@pytest.mark.parametrize("beams", [1, BEAMS])
def test_words_are_those_of_a_search_without_cache(captioner, beams):
    shown = pictures()
    prompt = "a <image> and a <image>on"
    words = captioner.continue_prompt(
        prompt,
        shown,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
    )
    expected = search(captioner, captioner.embed(prompt, shown), beams)
    assert words == captioner.tokenizer.batch_decode(expected, skip_special_tokens=True)


def test_the_embedded_prompt_is_what_the_stock_model_builds_itself(captioner):
    (first, second), model = pictures(), captioner.model
    tokenizer = captioner.tokenizer
    start, end = tokenizer.convert_tokens_to_ids(["<image>", "</image>"])
    picture = [start, *[start] * SLOTS, end]
    words = tokenizer.encode("on", add_special_tokens=False)
    ids = torch.tensor([[tokenizer.bos_token_id, *picture, *picture, *words]])
    mask = torch.zeros_like(ids)
    for offset in (2, 2 + SLOTS + 2):
        mask[0, offset : offset + SLOTS] = 1
    pixels = captioner.images([first, second], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        stock = model(pixel_values=pixels, input_ids=ids, image_embeds_position_mask=mask).logits
        embeds = captioner.embed("<image><image>on", [first, second])
        ours = model.text_model(inputs_embeds=embeds).logits
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_pictures_and_placeholders_must_agree(captioner):
    with pytest.raises(ValueError, match="1 <image> in the prompt, 2 picture"):
        captioner.embed("<image>", pictures())
