"""The sample store: a Megatron multimodal indexed dataset plus a manifest, read at random.

One document is one sample; its sequences are the sample's parts, told apart by Megatron's mode
byte. The container is uint8: encoded pictures stay as they were, token ids are little-endian int32.
Plain text is an ordinary Megatron token dataset, so existing corpora work as they are.

PREFIX.bin, PREFIX.idx  data and index
PREFIX.json             manifest (kind, tokenizer fingerprint, counts), written last
PREFIX.sentences.npy, PREFIX.sentence_offsets.npy  see sentences.py (kinds that `pretrain` packs)
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.fingerprint import dataset_fingerprint
from megatron_kosmosg.data.kinds import TEXT, find_kind
from megatron_kosmosg.data.manifest import Manifest, manifest_path
from megatron_kosmosg.data.mapped_sequences import MappedSequences
from megatron_kosmosg.data.sentences import sentence_paths, sentence_table
from megatron_kosmosg.data.stored_sample import (
    JSON,
    TOKEN_BYTES,
    TOKENS,
    PartSizes,
    RawSample,
    strip_document_end,
)
from megatron_kosmosg.data.tokenizer import Tokenizer

_DAMAGE = (IndexError, AssertionError, ValueError, KeyError, TypeError, OverflowError, struct.error)
"""What Megatron raises for an index that it cannot read."""


class SampleStore:
    """Random access to the samples under a prefix; safe to read from several threads.

    Raises FileNotFoundError when the dataset is missing and InputError when it is damaged.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        missing = [
            f"{prefix}{end}" for end in (".bin", ".idx") if not Path(f"{prefix}{end}").exists()
        ]
        if missing:
            raise FileNotFoundError(
                f"no dataset at {prefix}: {' and '.join(missing)} missing; write it with "
                "`kosmosg preprocess` or correct data.blend.NAME.path"
            )
        self.manifest: Manifest | None = None
        """None for a token dataset that another tool wrote."""
        if manifest_path(prefix).exists():
            self.manifest = Manifest.read(manifest_path(prefix))
        try:
            self.sample_kind = find_kind(self.manifest.kind) if self.manifest else TEXT
        except InputError as error:
            raise InputError(f"{manifest_path(prefix)}: {error}") from None
        try:
            self._data = MappedSequences(self.prefix, not self.sample_kind.is_plain_text)
        except _DAMAGE as error:
            raise InputError(
                f"{prefix}.idx is no whole index of a Megatron dataset ({error!r}); preprocess the "
                "dataset again"
            ) from None
        self._documents = self._data.document_indices
        self._fingerprint: str | None = None
        self._check()

    @property
    def kind(self) -> str:
        """Name of `sample_kind`."""
        return self.sample_kind.name

    def __len__(self) -> int:
        return len(self._documents) - 1

    def __getitem__(self, index: int) -> RawSample:
        if self.sample_kind.is_plain_text:
            return RawSample({"key": str(index)}, [self.text(index)], [TOKENS])
        first, last = int(self._documents[index]), int(self._documents[index + 1])
        return RawSample.of_bytes(self._data[i] for i in range(first, last))

    def fingerprint(self) -> str:
        """Of the content; see fingerprint.py."""
        if self._fingerprint is None:
            self._fingerprint = dataset_fingerprint(self.prefix)
        return self._fingerprint

    def part_sizes(self, index: int) -> PartSizes:
        """(mode, size) of each part but the JSON one, from the index alone: no data is read.

        Sizes are token ids, or bytes of a picture.
        """
        parts = slice(int(self._documents[index]), int(self._documents[index + 1]))
        sizes = self._data.index.sequence_lengths[parts].tolist()
        if self.sample_kind.is_plain_text:
            return [(TOKENS, sum(sizes))]
        modes = self._data.index.sequence_modes
        assert modes is not None  # of a multimodal dataset
        return [
            (mode, size // TOKEN_BYTES if mode == TOKENS else size)
            for mode, size in zip(modes[parts].tolist(), sizes, strict=True)
            if mode != JSON
        ]

    def part_lengths(self, indices: np.ndarray, part: int) -> np.ndarray:
        """int64: token ids of part number `part`, not counting the JSON part before it, of each
        sample, from the index alone."""
        sequences = self._documents[np.asarray(indices, np.int64)] + 1 + part
        bytes_ = self._data.index.sequence_lengths[sequences].astype(np.int64)
        return bytes_ // TOKEN_BYTES

    def text(self, index: int) -> np.ndarray:
        """Token ids of one document of a text dataset, mapped where it is one sequence."""
        first, last = int(self._documents[index]), int(self._documents[index + 1])
        sequences = [self._data[i][0] for i in range(first, last)]
        return sequences[0] if len(sequences) == 1 else np.concatenate(sequences)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises InputError unless the token ids were made by this very tokenizer."""
        if self.manifest and self.manifest.tokenizer_fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"{self.prefix} was written with another SentencePiece model (fingerprint "
                f"{self.manifest.tokenizer_fingerprint}, data.tokenizer_model has "
                f"{tokenizer.fingerprint}); preprocess it again or change data.tokenizer_model"
            )

    def sentences(self, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """(table int32 [sentences, 2], offsets int64 [samples + 1]) of sentences.py.

        Mapped from disk; computed (a pass over all tokens) for datasets of other tools.
        """
        table_path, offsets_path = sentence_paths(self.prefix)
        if self.manifest:
            return np.load(table_path, mmap_mode="r"), np.load(offsets_path, mmap_mode="r")
        tables = []
        for i in range(len(self)):
            ids = self.text(i)
            if ids.size and ids.max() >= tokenizer.vocab_size:
                raise InputError(
                    f"{self.prefix}: document {i} holds token id {ids.max()}, data.tokenizer_model "
                    f"has {tokenizer.vocab_size} ids: it was written with another tokenizer"
                )
            tables.append(sentence_table([strip_document_end(ids, tokenizer)], tokenizer))
        offsets = np.cumsum([0, *(len(table) for table in tables)])
        return np.concatenate([np.zeros((0, 2), np.int32), *tables]), offsets

    def _check(self) -> None:
        index, documents = self._data.index, self._documents
        is_in_order = (
            len(documents) > 0
            and documents[0] == 0
            and documents[-1] == len(index)
            and bool((documents[1:] >= documents[:-1]).all())
            and index.sequence_lengths.min(initial=0) >= 0
        )
        if not is_in_order:
            raise InputError(
                f"{self.prefix}.idx is damaged: its documents do not follow each other"
            )
        item = np.dtype(index.dtype).itemsize
        needed = int(index.sequence_lengths.astype(np.int64).sum()) * item
        stored = Path(f"{self.prefix}.bin").stat().st_size
        if stored != needed:
            raise InputError(f"{self.prefix}.bin has {stored} bytes, its index needs {needed}")
        if self.manifest and self.manifest.num_samples != len(self):
            raise InputError(
                f"{self.prefix}.json counts {self.manifest.num_samples} samples, the index "
                f"{len(self)}; preprocess the dataset again"
            )
        if len(self) == 0:
            raise InputError(f"{self.prefix} holds no samples")
