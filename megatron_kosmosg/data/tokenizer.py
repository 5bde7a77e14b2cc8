"""Text <-> token ids: a SentencePiece model behind the authors' fairseq dictionary order.

Ids: <s> 0, <pad> 1, </s> 2, <unk> 3, SentencePiece id p >= 3 at p + 1, then six specials, of which
<image> and </image> bracket an image. 64,000 pieces give the paper's vocabulary of 64,007.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data import scripts

IMAGE, END_IMAGE = "<image>", "</image>"
"""Bracket an image; <image> also fills its slots and, in texts of users, stands for one."""
TRAILING_SPECIALS = ("<mask>", "</doc>", IMAGE, END_IMAGE, "</chunk>", "</line>")
WORD_START = "\u2581"


class Tokenizer:
    """A SentencePiece model file with the special tokens around it.

    Raises FileNotFoundError, or InputError for another file, or a model whose ids 0, 1, 2 are not
    unk, bos, eos.
    """

    bos_id, pad_id, eos_id, unk_id = 0, 1, 2, 3

    def __init__(self, model_path: str | Path) -> None:
        path = Path(model_path)
        if not path.is_file():
            raise FileNotFoundError(f"no SentencePiece model at {path}; set data.tokenizer_model")
        model = path.read_bytes()
        self.fingerprint = hashlib.blake2b(model, digest_size=16).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise InputError(f"{path} is not a SentencePiece model") from error
        ids = (self._processor.unk_id(), self._processor.bos_id(), self._processor.eos_id())
        if ids != (0, 1, 2) or self._processor.pad_id() != -1:
            raise InputError(
                f"{path}: unk, bos, eos are {ids} and pad is {self._processor.pad_id()}; this "
                "model needs 0, 1, 2 and no pad piece (the SentencePiece trainer's defaults)"
            )
        self.num_pieces = self._processor.get_piece_size()
        self.vocab_size = self.num_pieces + 1 + len(TRAILING_SPECIALS)
        first = self.num_pieces + 1
        self.image_id = first + TRAILING_SPECIALS.index(IMAGE)
        self.end_image_id = first + TRAILING_SPECIALS.index(END_IMAGE)
        self._build_sentence_tables()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without <s> and </s>; blank text gives none. Specials are never parsed."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text as `encode` gives them, in an int32 array."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, as `encode_array` gives them; faster than a call for each."""
        # int32 arrays from C++: a Python list of the ids would cost as much as finding them.
        encoded = self._processor.encode(texts, return_type="numpy", num_threads=1)
        return [np.where(ids >= 3, ids + 1, np.int32(self.unk_id)) for ids in encoded]

    def encodes_words_alone(self) -> bool:
        """Whether a text's ids are those of its words between blanks, one after the other.

        True only where it is certain: for BPE models (their scores are ranks; a unigram model adds
        up the scores of a whole text, and rounding may decide) whose pieces never reach beyond a
        word and which take any run of blanks for one.
        """
        spm = self._processor
        pieces = range(3, self.num_pieces)
        if not all(spm.get_score(i).is_integer() for i in pieces):
            return False
        if any(WORD_START in spm.id_to_piece(i)[1:] for i in pieces):
            return False
        words = ["a", "b!", "C", "a"]
        alone = [i for word in words for i in spm.encode(word)]
        is_known = spm.piece_to_id(WORD_START) != spm.unk_id()
        return is_known and spm.encode("  a b!\n\n C\na ") == alone

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out, <unk> shows as SentencePiece's mark."""
        last = self.num_pieces
        pieces = [0 if i == self.unk_id else i - 1 for i in map(int, ids) if 3 <= i <= last]
        return self._processor.decode(pieces)

    def sentence_ends(self, ids: np.ndarray) -> np.ndarray:
        """Whether a sentence ends with each token: bool of the same length (text ids only).

        A sentence ends at a mark such as . ! ? (and closing quotes or brackets after it) before a
        new word; without a quote after it also at the marks of scripts that have no other use for
        them, and at ? ! (or a point between letters) before a letter of a script without spaces.
        Nowhere else; the end of a fragment is the caller's to mark.
        """
        ends = self._terminates[ids]
        closers = self._closes[ids]
        for _ in range(2):
            ends[1:] |= closers[1:] & ends[:-1]
        before, current, after = ids[:-1], ids, ids[1:]
        ends[:-1] &= self._starts_word[after]
        alone = self._is_sure_end[current]
        alone[:-1] &= ~self._goes_on[after]
        closes_unspaced = self._is_question_or_exclamation[current]
        closes_unspaced[1:] |= self._is_point[ids[1:]] & self._ends_unspaced[before]
        closes_unspaced[:-1] &= self._starts_unspaced[after]
        closes_unspaced[-1:] = False
        return ends | alone | closes_unspaced

    def _build_sentence_tables(self) -> None:
        pieces = [""] * self.vocab_size
        for i in range(3, self.num_pieces):
            pieces[i + 1] = self._processor.id_to_piece(i)

        def table(holds: Callable[[str], bool]) -> np.ndarray:
            return np.array([p != "" and holds(p) for p in pieces])

        marks = scripts.TERMINATORS + scripts.SURE_TERMINATORS
        self._terminates = table(lambda p: p.rstrip(scripts.CLOSERS).endswith(tuple(marks)))
        self._is_sure_end = table(lambda p: p[-1] in scripts.SURE_TERMINATORS)
        self._is_question_or_exclamation = table(
            lambda p: p.endswith(scripts.QUESTIONS_AND_EXCLAMATIONS)
        )
        self._is_point = table(lambda p: p in scripts.POINTS)
        self._closes = table(lambda p: p.strip(scripts.CLOSERS) == "")
        self._goes_on = table(lambda p: p.strip(scripts.CLOSERS + marks) == "")
        self._starts_unspaced = table(lambda p: scripts.is_unspaced(p) or p[0] in scripts.OPENERS)
        self._ends_unspaced = table(lambda p: scripts.is_unspaced(p[-1]))
        self._starts_word = table(lambda p: p.startswith(WORD_START))
        # A special token (a document's end, an image) also follows a finished sentence.
        self._starts_word[: self.unk_id] = True
        self._starts_word[self.num_pieces + 1 :] = True
