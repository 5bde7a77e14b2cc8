"""The captioning example against greedy and beam search written out, with several images."""

from __future__ import annotations

import pytest
import torch

from examples.inference.caption_image import Captioner
from tests.support.tiny_pipeline import prompt_image, tiny_pipeline

LENGTH, BEAMS = 4, 3
CAT, DOG = prompt_image(1), prompt_image(2)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("captions")
    tiny_pipeline(folder).save_pretrained(folder / "exported")
    return Captioner(folder / "exported")


def test_the_resampler_sees_all_patches_with_older_transformers_too(captioner):
    assert captioner.model.image_to_text_projection.x_attn.is_causal is False


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
    shown = [CAT, DOG]
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
    model, slots = captioner.model, captioner.model.config.latent_query_num
    tokenizer = captioner.tokenizer
    start, end = tokenizer.convert_tokens_to_ids(["<image>", "</image>"])
    prompt_image = [start, *[start] * slots, end]
    words = tokenizer.encode("on", add_special_tokens=False)
    ids = torch.tensor([[tokenizer.bos_token_id, *prompt_image, *prompt_image, *words]])
    mask = torch.zeros_like(ids)
    for offset in (2, 2 + slots + 2):
        mask[0, offset : offset + slots] = 1
    pixels = captioner.images([CAT, DOG], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        stock = model(pixel_values=pixels, input_ids=ids, image_embeds_position_mask=mask).logits
        embeds = captioner.embed("<image><image>on", [CAT, DOG])
        logits = model.text_model(inputs_embeds=embeds).logits
    torch.testing.assert_close(logits, stock, atol=1e-5, rtol=1e-5)


def test_images_and_placeholders_must_agree(captioner):
    with pytest.raises(ValueError, match="1 <image> in the prompt, 2 image"):
        captioner.embed("<image>", [CAT, DOG])
