"""Text -> token ids word by word, each word encoded once: several times SentencePiece's own speed.

The ids are SentencePiece's exactly: this is used only with models that encode the words of a text
one by one (Tokenizer.encodes_words_alone), and only space and line end count as the end of a word.
Whatever else SentencePiece takes for a blank stays inside a word, for SentencePiece to find.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from megatron_kosmosg.data.tokenizer import Tokenizer

MAX_WORDS = 500_000
"""Words that are remembered; later ones are encoded each time."""
MAX_CHARACTERS = 2 << 20
"""Of a text whose words are found together."""
_CONTROL = re.compile(r"[^\x20-\x7e\n]")


class WordCache:
    """Encodes batches of texts word by word, and remembers the ids of words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_usable = tokenizer.encodes_words_alone()
        self._numbers: dict[str, int]
        """Number of each word; its ids are `_pool[_starts[n] : _starts[n] + _lengths[n]]`."""
        self._forget()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, the same as Tokenizer.encode_batch gives."""
        if not (texts and self._is_usable):
            return self._tokenizer.encode_batch(texts)
        if max(map(len, texts)) <= MAX_CHARACTERS:
            return self._encode(texts)
        # A long text's words all at once would take some 30 bytes a character.
        pieces = ([self._encode([piece])[0] for piece in _pieces(text)] for text in texts)
        return [np.concatenate(encoded) for encoded in pieces]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        split = [_words(text) for text in texts]
        words = [word for of_text in split for word in of_text]
        numbers = list(map(self._numbers.get, words))
        if None in numbers:
            new = {word for word, number in zip(words, numbers, strict=True) if number is None}
            if len(self._numbers) + len(new) > MAX_WORDS:
                self._forget()
                new = set(words)
            self._learn(list(new))
            numbers = list(map(self._numbers.__getitem__, words))
        at = np.array(numbers, np.int64)
        lengths = self._lengths[at]
        ends = np.cumsum(lengths)
        # Position in the pool of every token: its word's start, plus its place in the word.
        places = np.repeat(self._starts[at] - (ends - lengths), lengths)
        ids = self._pool[places + np.arange(len(places))]
        per_text = np.cumsum([len(of_text) for of_text in split])[:-1]
        return np.split(ids, np.concatenate([[0], ends])[per_text])

    def _learn(self, words: list[str]) -> None:
        arrays = self._tokenizer.encode_batch(words)
        lengths = np.array([len(array) for array in arrays], np.int64)
        starts = len(self._pool) + np.cumsum(lengths) - lengths
        first = len(self._starts)
        self._numbers.update((word, first + i) for i, word in enumerate(words))
        self._pool = np.concatenate([self._pool, *arrays])
        self._starts = np.concatenate([self._starts, starts])
        self._lengths = np.concatenate([self._lengths, lengths])

    def _forget(self) -> None:
        self._numbers = {}
        self._pool, self._starts, self._lengths = np.zeros(0, np.int32), *np.zeros((2, 0), np.int64)


def _pieces(text: str) -> Iterator[str]:
    """The text in stretches of whole words."""
    start = 0
    while len(text) - start > MAX_CHARACTERS:
        end = text.rfind(" ", start, start + MAX_CHARACTERS) + 1
        if end <= start:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _words(text: str) -> list[str]:
    """The words between spaces and line ends. Some may be empty, which stands for no token."""
    if text.isascii() and _CONTROL.search(text) is None:
        return text.split()
    # split() without an argument knows more blanks (tabs, no-break spaces) than are meant here.
    return text.replace("\n", " ").split(" ")
