"""What tells scripts apart that are written without spaces, and where their sentences end.

Entities (kinds/entity_placement.py) and the cuts of packed rows (tokenizer.py) both go by it.
"""

from __future__ import annotations

import re
import unicodedata

UNSPACED = re.compile(
    "["
    "\u0e00-\u0e4f\u0e5a-\u0eff"  # Thai (its digits and signs of money aside), Lao
    "\u0f00-\u0fff"  # Tibetan
    "\u1000-\u109f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3021-\u3029"  # iteration marks and numbers of Han
    "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"  # Han
    "]"
)
"""One letter of such a script. Korean has spaces."""

TERMINATORS = ".!?\u2026\u203c\u203d\u2047\u2048\u2049\u0f0d\u0f0e"
"""A sentence ends at one of these before a new word: ... and ?! in one character, Tibetan's."""
SURE_TERMINATORS = (
    "\u3002\uff01\uff1f\uff61"  # Chinese, Japanese
    "\u0964\u0965"  # danda, double danda of the Indian scripts
    "\u061f\u06d4\u0700\u0701\u0702"  # Arabic question mark, Urdu full stop; Syriac
    "\u0589\u1362\u1367\u1368\u166e\u1803\u1809"  # Armenian, Ethiopic, Canadian, Mongolian
    "\u17d4\u17d5\u104a\u104b"  # Khmer, Myanmar
)
"""A sentence ends at one of these whatever follows, as they have no other use."""
POINTS = (".", "\uff0e")
QUESTIONS_AND_EXCLAMATIONS = ("?", "!")
"""What SentencePiece's normalisation makes of Chinese and Japanese full-width marks."""
CLOSERS = "\"')]}\u201d\u2019\u00bb\u300d\u300f\u300b\u3009\u3011\u3015\uff09\uff3d"
"""Quotes and brackets that belong to the sentence whose mark they follow."""
OPENERS = "\u201c\u2018\u300c\u300e\u300a\u3008\u3010\u3014\uff08"
"""Begin a sentence where a letter of an unspaced script would."""


def is_unspaced(letter: str) -> bool:
    """Whether the letter belongs to a script without spaces."""
    return UNSPACED.match(letter) is not None


def find_words(words: str, text: str) -> re.Match[str] | None:
    """The place where `words` stand in `text` as whole words, upper and lower case alike. Where
    they or their neighbours belong to a script without spaces, any place will do."""
    sought = re.compile(re.escape(words), re.IGNORECASE)
    found = sought.search(text)
    while found is not None:
        start, end = found.span()
        if _parts(text[max(0, start - 1) : start], words[0]) and _parts(
            text[end : end + 1], words[-1]
        ):
            return found
        found = sought.search(text, start + 1)
    return None


def _parts(neighbour: str, letter: str) -> bool:
    """Whether a word that ends, or begins, with `letter` is whole beside `neighbour` ("": none)."""
    if is_unspaced(letter) or (neighbour and is_unspaced(neighbour)):
        return True
    return _is_of_word(neighbour) != _is_of_word(letter)


def _is_of_word(letter: str) -> bool:
    """Regular expressions take marks, among them the vowels of Indian scripts, for no letters."""
    is_mark = letter != "" and unicodedata.category(letter)[0] == "M"
    return letter.isalnum() or letter == "_" or is_mark
