"""Tiny random models of the real classes, as folders: BLIP-2, a language model, CLIPSeg."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

NOUNS = "dog cat house garden ball tree boat horse kite lamp".split()
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<image>"]
IMAGE_TOKEN = SPECIAL.index("<image>")
CHAT = (
    "{% for m in messages %}<s> user {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}answer {% endif %}"
)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def _words(folder: Path, has_marks: bool, **options: object) -> int:
    """A word-level tokenizer in `folder`, which may put <s> and </s> around texts; its size."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *NOUNS, "user", "answer", "[", "]", ","])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if has_marks:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        **options,
    ).save_pretrained(folder)
    return len(vocab)


def write_blip2(folder: Path) -> Path:
    """A captioner that says nouns."""
    torch.manual_seed(1)
    size = _words(folder, False)
    text = OPTConfig(
        vocab_size=size,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            **SMALL, num_hidden_layers=1, image_size=28, patch_size=14
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            **SMALL, num_hidden_layers=1, vocab_size=size, encoder_hidden_size=16
        ).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=3,
        image_token_index=IMAGE_TOKEN,
    )
    model = Blip2ForConditionalGeneration(config)
    # Images have to matter, and the answers have to be words.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def write_language_model(folder: Path) -> Path:
    """A language model with a chat template, whose answers are no lists."""
    torch.manual_seed(2)
    size = _words(folder, False, chat_template=CHAT)
    model = LlamaForCausalLM(
        LlamaConfig(
            **SMALL,
            vocab_size=size,
            num_hidden_layers=1,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    return folder


def write_clipseg(folder: Path) -> Path:
    """A segmenter whose maps depend on image and words."""
    torch.manual_seed(3)
    size = _words(folder, True, model_max_length=16)
    layers = {"num_hidden_layers": 2, "projection_dim": 8}
    config = CLIPSegConfig(
        text_config=SMALL
        | layers
        | {
            "vocab_size": size,
            "max_position_embeddings": 16,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
        vision_config=SMALL | layers | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
        extract_layers=[0, 1],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    model = CLIPSegForImageSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        model.decoder.film_mul.weight.normal_(0, 2)
    model.save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(folder)
    return folder
