"""Plain text: documents -> token ids, many at a time and (word_cache.py) word by word.

The result of a document does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import numpy as np

from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.data.stored_sample import TOKEN_TYPE
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.preprocess.shard_store import ShardWriter
from megatron_kosmosg.preprocess.word_cache import WordCache

MAX_DOCUMENTS, MAX_CHARACTERS = 256, 1 << 20


class TextBatches:
    """Collects documents and writes each full batch."""

    def __init__(self, tokenizer: Tokenizer, words: WordCache, writer: ShardWriter) -> None:
        self._tokenizer = tokenizer
        self._words = words
        self._writer = writer
        self._records: list[Record] = []
        self._texts: list[str] = []
        self._characters = 0

    def add(self, record: Record, text: str) -> None:
        """Takes the document `text` of a record into the batch."""
        self._records.append(record)
        self._texts.append(text)
        self._characters += len(text)

    @property
    def is_full(self) -> bool:
        """Whether the batch is full, so that `flush` is due."""
        return len(self._texts) >= MAX_DOCUMENTS or self._characters >= MAX_CHARACTERS

    def flush(self) -> list[tuple[Record, Rejected]]:
        """Writes the documents collected so far; returns those that hold no token."""
        if not self._texts:
            return []
        arrays = self._words.encode_batch(self._texts)
        records, empty = [], []
        for record, ids in zip(self._records, arrays, strict=True):
            if len(ids):
                records.append(record)
            else:
                empty.append((record, Rejected("text without tokens")))
        self._write(records, [ids for ids in arrays if len(ids)])
        self._records, self._texts, self._characters = [], [], 0
        return empty

    def _write(self, records: list[Record], arrays: list[np.ndarray]) -> None:
        if not records:
            return
        end = np.array([self._tokenizer.eos_id], TOKEN_TYPE)
        ids = np.concatenate([part for array in arrays for part in (array, end)])
        lengths = np.array([len(array) for array in arrays], np.int64)
        sentences, num_sentences = sentence_lengths(ids, lengths, self._tokenizer)
        self._writer.add_bytes(ids.astype(TOKEN_TYPE).tobytes())
        self._writer.add_arrays(
            lengths=(lengths + 1).astype(np.int32),
            modes=np.zeros(len(lengths), np.int8),
            num_parts=np.ones(len(lengths), np.int32),
            sentences=np.stack([sentences, np.zeros_like(sentences)], axis=1),
            num_sentences=num_sentences,
            num_tokens=lengths,
            num_images=np.zeros(len(lengths), np.int64),
            names=[(r.source, r.key if r.has_own_key else None) for r in records],
        )


def sentence_lengths(
    ids: np.ndarray, lengths: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each sentence (int32), sentences of each document (int32).

    `ids`: documents one after the other, each closed by </s>; `lengths`: their tokens without it.
    The same as sentence_table gives for each document alone: </s> parts sentences like a word does.
    """
    document_ends = np.cumsum(lengths + 1) - 1
    is_end = tokenizer.sentence_ends(ids)
    is_end[document_ends - 1] = True
    ends = np.flatnonzero(is_end)
    starts = np.concatenate([[0], ends[:-1] + 1])
    starts += ids[starts] == tokenizer.eos_id
    per_document = np.diff(np.searchsorted(ends, document_ends), prepend=0)
    return (ends - starts + 1).astype(np.int32), per_document.astype(np.int32)
