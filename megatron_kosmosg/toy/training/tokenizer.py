"""Trains the toy SentencePiece model: unigram, nmt_nfkc, default ids, each toy word one piece."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_kosmosg.files import replacing
from megatron_kosmosg.toy.toy_captions import ALL_WORDS
from megatron_kosmosg.toy.toy_records import document
from megatron_kosmosg.toy.training.plain_english import SENTENCES

VOCABULARY = 320
NUM_DOCUMENTS = 1500
WORD_REPEATS = 3000
"""Times each toy word stands in the training text, so that none is worth cutting."""
ENGLISH_REPEATS = 4


def corpus(seed: int) -> list[str]:
    """Toy documents (training combinations), every toy word often, and plain English."""
    documents = [document(np.random.default_rng((seed, i)), False) for i in range(NUM_DOCUMENTS)]
    words = [*dict.fromkeys(ALL_WORDS), "."]
    order = np.random.default_rng(seed)
    lists = [" ".join(order.permutation(words)) for _ in range(WORD_REPEATS)]
    return documents + lists + list(SENTENCES) * ENGLISH_REPEATS


def train(path: Path, seed: int) -> None:
    """Writes the model file. Raises ValueError when a toy word is not one piece."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(seed)),
        model_writer=out,
        model_type="unigram",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=2,
    )
    check(out.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(out.getvalue())


def check(model: bytes) -> None:
    """Raises ValueError when a toy word after a space is not one known piece."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for word in (*ALL_WORDS, "."):
        pieces = processor.encode(f"a {word}", out_type=str)
        if pieces != ["\u2581a", f"\u2581{word}"]:
            raise ValueError(f"the word {word!r} is cut into {pieces[1:]}; raise WORD_REPEATS")
