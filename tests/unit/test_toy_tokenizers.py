"""The shipped SentencePiece model: every toy word is one piece, and other English still passes."""

from __future__ import annotations

import numpy as np

from megatron_kosmosg.data.sentences import sentence_table
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.toy_captions import ALL_WORDS

MODEL = assets.path() / "sentencepiece.model"


def test_each_toy_word_is_one_piece_of_its_own():
    tokenizer = Tokenizer(MODEL)
    words = [*dict.fromkeys(ALL_WORDS), "."]
    ids = [tokenizer.encode(word) for word in words]
    assert all(len(found) == 1 for found in ids), dict(zip(words, ids, strict=True))
    assert len({found[0] for found in ids}) == len(words)
    assert tokenizer.unk_id not in {found[0] for found in ids}
    sentence = " ".join(words)
    assert tokenizer.encode(sentence) == [found[0] for found in ids]


def test_text_survives_encoding():
    tokenizer = Tokenizer(MODEL)
    for text in ("a crimson circle with navy dots .", "Zebras jumped over 12 quick foxes!"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentences_end_at_their_points():
    tokenizer = Tokenizer(MODEL)
    ids = np.array(tokenizer.encode("make it blue . a red circle . put it on a pink background ."))
    assert sentence_table([ids], tokenizer)[:, 0].tolist() == [4, 4, 7]
