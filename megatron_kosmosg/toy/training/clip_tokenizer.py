"""The toy CLIP tokenizer's files: a byte-pair encoding in which each toy word is one token.

Merges of equal frequency come in another order each time, so a text model belongs to its files.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from megatron_kosmosg.toy.toy_captions import ALL_WORDS

NUM_POSITIONS = 21
"""Length of a padded caption; the longest has 19 tokens with its two ends."""
START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def write(folder: Path) -> CLIPTokenizer:
    """Trains the merges on the word list, writes vocab.json, merges.txt and the configs."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted(set(ALL_WORDS))
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=LETTERS,
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for token in (*LETTERS, *(letter + "</w>" for letter in LETTERS), START, END):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8"
    )
    result = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=NUM_POSITIONS
    )
    for word in words:
        if len(result(word, add_special_tokens=False).input_ids) != 1:
            raise ValueError(f"the word {word!r} is not one token")
    result.save_pretrained(folder)
    return result


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> list[list[int]]:
    """Ids of each caption, padded with the end token to NUM_POSITIONS."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=NUM_POSITIONS
    ).input_ids
