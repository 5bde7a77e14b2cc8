"""Word by word gives SentencePiece's own ids; models where it would not are told apart."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sentencepiece

from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.preprocess import word_cache
from megatron_kosmosg.preprocess.word_cache import WordCache
from tests.support.data_helpers import WORDS, write_tokenizer

# Blanks of every kind, combining marks, ligatures, wide letters, control characters, emoji.
ODD = [*range(1, 0x20), *range(0x7F, 0x100), *range(0x300, 0x310), 0x200B, 0x2009, 0x3000, 0x2581]
ODD += [0xFB01, 0xFF21, 0x4E2D, 0x1F600, 0xAC00, 0x1100, 0x1161, 0x2028, 0xFEFF]
ALPHABET = [*map(chr, ODD), *" \n" * 40, *"abcdeghinorst.!" * 10]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("words")))


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(ALPHABET, k=draw.randrange(50))) for _ in range(count)]


def check(words: WordCache, tokenizer: Tokenizer, texts: list[str]) -> None:
    for text, ids in zip(texts, words.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text), repr(text)


def test_ids_are_sentencepieces_for_any_text(tokenizer):
    assert tokenizer.encodes_words_alone()
    words = WordCache(tokenizer)
    check(words, tokenizer, random_texts(500))
    check(words, tokenizer, ["red dog", "", " \n", "red\tdog", "red\u00a0dog"])
    check(words, tokenizer, [""])
    assert words.encode_batch([]) == []


def test_a_long_text_is_encoded_in_pieces(tokenizer, monkeypatch):
    monkeypatch.setattr(word_cache, "MAX_CHARACTERS", 20)
    texts = random_texts(100) + ["x" * 50 + " red dog", "red dog " * 20, ""]
    check(WordCache(tokenizer), tokenizer, texts)


def test_a_full_cache_starts_anew(tokenizer, monkeypatch):
    monkeypatch.setattr(word_cache, "MAX_WORDS", 5)
    words = WordCache(tokenizer)
    for i in range(0, len(WORDS), 4):
        check(words, tokenizer, [" ".join(WORDS[i : i + 4]), WORDS[0]])


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"split_by_whitespace": False, "vocab_size": 150},
        {"treat_whitespace_as_suffix": True},
        {"remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity"},
    ],
)
def test_other_models_are_not_trusted(tmp_path, options):
    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 20),
        model_prefix=str(prefix),
        **{"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2, "model_type": "bpe"}
        | options,
    )
    other = Tokenizer(f"{prefix}.model")
    assert not other.encodes_words_alone()
    texts = ["red dog  a\n\nhouse", "a  b"]
    check(WordCache(other), other, texts)
