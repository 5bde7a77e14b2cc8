"""The three models of data construction, as tiny random models of the real classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPSegForImageSegmentation

from megatron_kosmosg.construction.captioner import Blip2Captioner
from megatron_kosmosg.construction.entity_model import EntityModel
from megatron_kosmosg.construction.entity_prompt import PROMPT
from megatron_kosmosg.construction.segmenter import ClipSegmenter
from tests.support.construction_models import (
    NOUNS,
    write_blip2,
    write_clipseg,
    write_language_model,
)

CPU = torch.device("cpu")


def shown(count: int, side: int = 40) -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [
        Image.fromarray(rng.integers(0, 256, (side + i, side + i, 3), dtype=np.uint8))
        for i in range(count)
    ]


def test_captions_do_not_depend_on_the_batch_and_hold_the_answer_only(tmp_path):
    captioner = Blip2Captioner(write_blip2(tmp_path / "blip2"), torch.float32, CPU, max_tokens=5)
    images = shown(6)
    together = captioner(images)
    assert together == [captioner([image])[0] for image in images]
    assert len(set(together)) > 1, "pictures should matter"
    assert all(len(caption.split()) <= 5 for caption in together)
    assert set(" ".join(together).split()) <= {*NOUNS, "user", "answer", "[", "]", ","}


def test_answers_do_not_depend_on_padding(tmp_path):
    folder = write_language_model(tmp_path / "lm")
    ask = EntityModel(folder, torch.float32, CPU, max_tokens=6, prompt="user {caption} answer")
    captions = ["dog", "cat garden ball tree boat horse", "kite lamp"]
    together = ask(captions)
    assert together == [ask([caption])[0] for caption in captions]
    assert len(set(together)) > 1
    # The same by hand: template, then the most likely token again and again.
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    ids = tokenizer("<s> user user dog answer answer", add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(6):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert together[0] == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_the_prompt_asks_about_one_caption():
    assert PROMPT.count("{caption}") == 1 and PROMPT.endswith("Answer:")


def test_each_name_is_looked_for_in_its_own_image(tmp_path):
    folder = write_clipseg(tmp_path / "clipseg")
    segmenter = ClipSegmenter(folder, torch.float32, CPU)
    a, b = shown(2)
    named = [(a, "dog"), (a, "garden cat"), (b, "dog")]
    maps = segmenter(named)
    assert [one.shape for one in maps] == [(40, 40), (40, 40), (41, 41)]
    model = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for (image, name), found in zip(named, maps, strict=True):
        small = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
        pixels = torch.from_numpy((small / 255 - 0.5) / 0.25).permute(2, 0, 1)[None]
        with torch.inference_mode():
            logits = model(**tokenizer(name, return_tensors="pt"), pixel_values=pixels).logits
        expected = torch.nn.functional.interpolate(
            torch.sigmoid(logits.reshape(1, 1, 32, 32)), image.size, mode="bilinear"
        )
        assert np.abs(found - expected.numpy()[0, 0]).max() < 1e-4
    assert np.abs(maps[0] - maps[1]).max() > 1e-3, "words should matter"


def test_a_folder_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded"):
        EntityModel(tmp_path, torch.float32, CPU, 6, PROMPT)
