"""Full-sentence packing for `pretrain`: rows of whole sentences from consecutive documents.

An epoch is its documents in shuffled order, each <s> document </s>, laid end to end. A row takes
sentences until the next one does not fit (the rest is padding); only a sentence longer than a row
is cut, never inside a picture. A row is thus one stretch of the epoch, found by its number alone.
The index of one epoch takes 16 bytes a document and 8 a row, plus the sentence table while built.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from megatron_kosmosg.data import caption, interleaved, text
from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.samples import PackedRow, RowImage
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.store import SampleStore

DOCUMENTS = {
    "text": text.document,
    "caption": caption.document,
    "interleaved": interleaved.document,
}
"""How each kind becomes a document; the kinds that can be packed."""
EPOCHS_KEPT = 2


@dataclass(frozen=True)
class EpochIndex:
    """Where documents and rows of one epoch begin, in tokens from the start of the epoch."""

    documents: np.ndarray
    """int64 [documents]: sample index, in the order of the epoch."""
    document_starts: np.ndarray
    """int64 [documents + 1]."""
    row_starts: np.ndarray
    """int64 [rows + 1]."""

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1


class PackedDataset:
    """The rows of one dataset by how often it was drawn; random access, thread-safe.

    `capacity`: tokens of a row, one more than the model reads because labels are shifted.
    """

    def __init__(
        self,
        name: str,
        store: SampleStore,
        order: SampleOrder,
        sequence_format: SequenceFormat,
        capacity: int,
    ) -> None:
        if store.kind not in DOCUMENTS:
            raise ValueError(
                f"data.blend.{name}: {store.prefix} is of kind {store.kind}; "
                f"pretrain packs {', '.join(DOCUMENTS)}"
            )
        if capacity < sequence_format.image_length + 2:
            raise ValueError(
                f"data.seq_length={capacity - 1} does not hold one picture of "
                f"{sequence_format.image_length} positions; raise data.seq_length"
            )
        store.check_tokenizer(sequence_format.tokenizer)
        self._name, self._store, self._order = name, store, order
        self._format, self._capacity = sequence_format, capacity
        self._sentences, self._offsets = store.sentences(sequence_format.tokenizer)
        if len(self._sentences) == 0:
            raise ValueError(f"data.blend.{name}: {store.prefix} holds no text and no pictures")
        self._lock = threading.Lock()
        self._epoch_rows: list[int] = []
        """Rows of each epoch indexed so far; later epochs follow from earlier ones."""
        self._indices: OrderedDict[int, EpochIndex] = OrderedDict()

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
            self._indices[epoch] = self._build_index(epoch)
            if len(self._indices) > EPOCHS_KEPT:
                self._indices.popitem(last=False)
        return self._indices[epoch]

    def _build_index(self, epoch: int) -> EpochIndex:
        documents = self._order.epoch(epoch).take(np.arange(len(self._store)))
        counts = self._offsets[documents + 1] - self._offsets[documents]
        documents, counts = documents[counts > 0], counts[counts > 0]
        firsts = np.cumsum(counts) - counts
        table_rows = np.repeat(self._offsets[documents] - firsts, counts) + np.arange(counts.sum())
        table = self._sentences[table_rows]
        lengths = table[:, 0] + table[:, 1].astype(np.int64) * self._format.image_length
        lengths[firsts] += 1  # <s>
        lengths[firsts + counts - 1] += 1  # </s>
        ends = np.cumsum(lengths)
        document_starts = np.concatenate([[0], ends[firsts + counts - 1]])
        ends = self._cut_long_sentences(ends, lengths, table[:, 1], documents, document_starts)
        return EpochIndex(documents, document_starts, pack_rows(ends, self._capacity))

    def _cut_long_sentences(
        self,
        ends: np.ndarray,
        lengths: np.ndarray,
        images: np.ndarray,
        documents: np.ndarray,
        document_starts: np.ndarray,
    ) -> np.ndarray:
        """`ends` with further cuts inside the sentences that exceed a row."""
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
            # Every position may be a cut except those inside a picture.
            allowed = np.ones(document.length + 1, bool)
            for at in document.image_starts:
                allowed[at + 1 : at + self._format.image_length] = False
            atoms = np.flatnonzero(allowed) + offset
            inside = atoms[(atoms > start) & (atoms <= stop)] - start
            extra.append(pack_rows(inside, self._capacity)[1:-1] + start)
        return np.sort(np.concatenate([ends, *extra])) if extra else ends

    def _document(self, sample: int) -> tuple[str, SequenceBuilder]:
        raw = self._store[sample]
        return raw.info["key"], DOCUMENTS[self._store.kind](raw, self._format)


def pack_rows(ends: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [rows + 1]: the greedy row boundaries, the first 0, the last ends[-1].

    `ends`: where a cut is allowed, increasing, no two further apart than `capacity`.
    """
    starts = np.concatenate([[0], ends[:-1]])
    following = np.searchsorted(ends, starts + capacity, "right")
    boundaries, piece = [0], 0
    while piece < len(ends):
        piece = int(following[piece])
        boundaries.append(int(ends[piece - 1]))
    return np.array(boundaries, np.int64)
