"""Full-sentence packing for `pretrain`: rows of whole sentences from consecutive documents.

An epoch is its documents in shuffled order, each <s> document </s>, laid end to end. A row takes
sentences until the next one does not fit (the rest is padding); only a sentence longer than a row
is cut, never inside an image. A row is thus one stretch of the epoch, found by its number alone
in the index of packing_index.py.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.data.kinds import names_read_by
from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.packing_index import (
    EpochIndex,
    load_or_build,
    pack_rows,
    write_index,
)
from megatron_kosmosg.data.samples import PackedRow, RowImage
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.stored_sample import strip_document_end

EPOCHS_KEPT = 2
"""Indices that stay in memory or mapped."""
BLOCK = 65_536
"""Documents that are indexed together, which bounds the memory. Indices of smaller datasets are not
kept in files."""
SHARDS_OF_A_BLOCK, LARGEST_BLOCK = 256, 8
"""Every shard of a block costs some calls, so that a dataset of many has larger blocks: of BLOCK
documents for so many shards, up to so many times BLOCK."""
FORMAT_VERSION = 1
"""Of the rule by which rows are made; part of an index's name on disk."""


class PackedDataset:
    """The rows of one dataset by how often it was drawn; random access, thread-safe.

    Args:
        capacity: tokens of a row, one more than the model reads because labels are shifted.
    """

    def __init__(
        self,
        name: str,
        store: SampleStore,
        order: SampleOrder,
        sequence_format: SequenceFormat,
        capacity: int,
        index_folder: Path,
    ) -> None:
        """Raises ConfigError for a dataset that cannot be packed. The index of an epoch is built
        when a row of it is read.

        Args:
            capacity: tokens of a row.
            index_folder: folder in which indices are kept, each in a subfolder of its own.
        """
        documents = store.sample_kind.pretrain
        if documents is None:
            raise ConfigError(
                f"data.blend.{name}: {store.prefix} is of kind {store.kind}; "
                f"pretrain packs {names_read_by('pretrain')}"
            )
        if capacity < sequence_format.image_length + 2:
            raise ConfigError(
                f"data.seq_length={capacity - 1} does not hold one image of "
                f"{sequence_format.image_length} positions; raise data.seq_length"
            )
        store.check_tokenizer(sequence_format.tokenizer)
        self._name, self._store, self._order = name, store, order
        self._documents = documents
        self._format, self._capacity = sequence_format, capacity
        self._index_folder = index_folder
        self._sentences = store.sentences(sequence_format.tokenizer)
        if self._sentences.is_empty:
            raise ConfigError(f"data.blend.{name}: {store.prefix} holds no text and no images")
        self._lock = threading.Lock()
        self._epoch_rows: list[int] = []
        """Rows of each epoch indexed so far; later epochs follow from earlier ones."""
        self._indices: OrderedDict[int, EpochIndex] = OrderedDict()

    def fingerprint(self) -> str:
        """The fingerprint of the dataset's content."""
        return self._store.fingerprint()

    def row(self, ordinal: int, position: int) -> PackedRow:
        """Row number `ordinal`, counted over all epochs; it will stand at stream `position`."""
        index, row = self._locate(ordinal)
        start, stop = int(index.row_starts[row]), int(index.row_starts[row + 1])
        first = int(np.searchsorted(index.document_starts, start, "right")) - 1
        last = int(np.searchsorted(index.document_starts, stop, "left"))
        tokens, image_mask, label_mask = [], [], []
        images: list[RowImage] = []
        for place in range(first, last):
            sample = int(index.documents[place])
            offset = int(index.document_starts[place])
            if self._store.sample_kind.is_plain_text:
                text = self._text(sample, max(start - offset, 0), stop - offset)
                tokens.append(text.tokens)
                image_mask.append(text.image_mask)
                label_mask.append(text.label_mask)
                continue
            key, document = self._document(sample)
            begin, end = max(start - offset, 0), min(stop - offset, document.length)
            tokens.append(document.tokens[begin:end])
            image_mask.append(document.image_mask[begin:end])
            label_mask.append(document.label_mask[begin:end])
            for image, at in zip(document.images, document.image_starts, strict=True):
                if begin <= at < end:
                    shift = offset - start
                    assert isinstance(image, bytes)
                    images.append(RowImage(image, at + shift, end + shift, self._name, key))
        return PackedRow(
            position,
            np.concatenate(tokens),
            np.concatenate(image_mask),
            np.concatenate(label_mask),
            images,
        )

    def _locate(self, ordinal: int) -> tuple[EpochIndex, int]:
        with self._lock:
            epoch = 0
            while True:
                if epoch == len(self._epoch_rows):
                    self._epoch_rows.append(self._index(epoch).num_rows)
                if ordinal < self._epoch_rows[epoch]:
                    return self._index(epoch), ordinal
                ordinal -= self._epoch_rows[epoch]
                epoch += 1

    def _index(self, epoch: int) -> EpochIndex:
        if epoch not in self._indices:
            self._indices[epoch] = self._make_index(epoch)
            if len(self._indices) > EPOCHS_KEPT:
                self._indices.popitem(last=False)
        return self._indices[epoch]

    def _make_index(self, epoch: int) -> EpochIndex:
        if len(self._store) <= BLOCK:  # quicker made than read
            everything = self._order.epoch(epoch).take(np.arange(len(self._store)))
            documents, document_starts, cuts = self._index_block(everything)
            return EpochIndex(documents, document_starts, pack_rows(cuts, self._capacity))
        folder = self._index_folder / f"epoch{epoch}-{self._index_name(epoch)}"
        return load_or_build(folder, partial(self._write_index, epoch))

    def _index_name(self, epoch: int) -> str:
        """Changes with everything that the index depends on."""
        parts = (
            FORMAT_VERSION,
            self.fingerprint(),
            self._format.tokenizer.fingerprint,
            self._order.epoch_key(epoch),
            self._format.image_length,
            self._capacity,
        )
        text = "|".join(map(str, parts)).encode()
        return hashlib.blake2b(text, digest_size=8, person=b"kosmosg-packing").hexdigest()

    def _write_index(self, epoch: int, folder: Path) -> None:
        permutation, size = self._order.epoch(epoch), len(self._store)
        larger = len(self._store.shards) // SHARDS_OF_A_BLOCK
        block = BLOCK * max(1, min(larger, LARGEST_BLOCK))

        def index_block(first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            places = np.arange(first, min(first + block, size))
            return self._index_block(permutation.take(places))

        write_index(folder, self._capacity, range(0, size, block), index_block)

    def _index_block(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(documents that hold anything, their starts and the end, allowed cuts) of a block of
        documents, in tokens from its start."""
        table, counts = self._sentences.take(documents)
        documents, counts = documents[counts > 0], counts[counts > 0]
        if not len(documents):
            return documents, np.zeros(1, np.int64), np.zeros(0, np.int64)
        firsts = np.cumsum(counts) - counts
        lengths = table[:, 0] + table[:, 1].astype(np.int64) * self._format.image_length
        lengths[firsts] += 1  # <s>
        lengths[firsts + counts - 1] += 1  # </s>
        ends = np.cumsum(lengths)
        document_starts = np.concatenate([[0], ends[firsts + counts - 1]])
        cuts = self._cut_long_sentences(ends, lengths, table[:, 1], documents, document_starts)
        return documents, document_starts, cuts

    def _cut_long_sentences(
        self,
        ends: np.ndarray,
        lengths: np.ndarray,
        images: np.ndarray,
        documents: np.ndarray,
        document_starts: np.ndarray,
    ) -> np.ndarray:
        """The sentence ends `ends`, with further cuts inside the sentences that are longer than a
        row."""
        extra = []
        for sentence in np.flatnonzero(lengths > self._capacity):
            stop = int(ends[sentence])
            start = stop - int(lengths[sentence])
            if images[sentence] == 0:
                extra.append(np.arange(start + self._capacity, stop, self._capacity))
                continue
            place = int(np.searchsorted(document_starts, start, "right")) - 1
            offset = int(document_starts[place])
            _, document = self._document(int(documents[place]))
            # Every position may be a cut except those inside an image.
            allowed = np.ones(document.length + 1, bool)
            for at in document.image_starts:
                allowed[at + 1 : at + self._format.image_length] = False
            atoms = np.flatnonzero(allowed) + offset
            inside = atoms[(atoms > start) & (atoms <= stop)] - start
            extra.append(pack_rows(inside, self._capacity)[1:-1] + start)
        return np.sort(np.concatenate([ends, *extra])) if extra else ends

    def _text(self, sample: int, begin: int, end: int) -> SequenceBuilder:
        """Positions [begin, end) of <s> text </s>: a row costs the same however long its document
        is. `end` may lie behind the document."""
        ids = strip_document_end(self._store.text(sample), self._format.tokenizer)
        builder = SequenceBuilder(self._format)
        if begin == 0:
            builder.add_start()
        builder.add_text(ids[max(begin - 1, 0) : max(end - 1, 0)])
        if end >= len(ids) + 2:
            builder.add_end()
        return builder

    def _document(self, sample: int) -> tuple[str, SequenceBuilder]:
        raw = self._store[sample]
        return raw.info["key"], self._documents.document(raw, self._format)
