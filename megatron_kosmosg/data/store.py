"""The sample store: a Megatron multimodal indexed dataset plus a manifest, read at random.

One document is one sample; its sequences are the sample's parts, told apart by Megatron's mode
byte. The container is uint8: encoded images stay as they were, token ids are little-endian int32.
Plain text is an ordinary Megatron token dataset, so existing corpora work as they are.

PREFIX.bin, PREFIX.idx  data and index
PREFIX.json             manifest (kind, tokenizer fingerprint, counts), written last
PREFIX.sentences.npy, PREFIX.sentence_offsets.npy  see sentences.py (kinds that `pretrain` packs)
PREFIX.bin.url          in place of PREFIX.bin: where in object storage that is (data_file.py)

A manifest may list shards in place of these files: each has all of them under a prefix of its own.
Samples are then numbered through the shards, and all that depends on the numbers stays the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_kosmosg.config.dataset_prefixes import missing_files
from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.data_file import is_remote
from megatron_kosmosg.data.fingerprint import dataset_fingerprint
from megatron_kosmosg.data.joined_files import joined_fingerprint
from megatron_kosmosg.data.kinds import TEXT, find_kind
from megatron_kosmosg.data.manifest import Manifest, manifest_path
from megatron_kosmosg.data.sentences import sentence_table
from megatron_kosmosg.data.shard_list import check_shard_files
from megatron_kosmosg.data.stored_sample import (
    JSON,
    TOKEN_BYTES,
    TOKENS,
    PartSizes,
    RawSample,
    strip_document_end,
)
from megatron_kosmosg.data.stored_shards import ComputedSentences, SentenceTables, StoredShards
from megatron_kosmosg.data.tokenizer import Tokenizer


class SampleStore:
    """Random access to the samples of a dataset; safe to read from several threads.

    `len(store)` is their number and `store[i]` the sample `i`, a RawSample: token ids, encoded
    images and a small JSON object.

    Args:
        prefix: path of the dataset without `.bin`, `.idx` or `.json`.

    Raises:
        FileNotFoundError: the dataset is missing.
        InputError: it is damaged.
        StorageError: a shard lies in object storage, which cannot be asked for it.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.manifest: Manifest | None = None
        """None for a token dataset that another tool wrote."""
        if manifest_path(prefix).exists():
            self.manifest = Manifest.read(manifest_path(prefix))
        entries = self.manifest.shards if self.manifest else ()
        missing = [] if entries else missing_files(prefix)
        if missing:
            raise FileNotFoundError(
                f"no dataset at {prefix}: {' and '.join(missing)} missing; write it with "
                "`kosmosg preprocess`, or give the prefix of another (a run: data.blend.NAME.path)"
            )
        try:
            self.sample_kind = find_kind(self.manifest.kind) if self.manifest else TEXT
        except InputError as error:
            raise InputError(f"{manifest_path(prefix)}: {error}") from None
        has_modes = not self.sample_kind.is_plain_text
        remote = check_shard_files(prefix, entries, has_modes)
        if not entries and is_remote(prefix):
            remote = [0]
        self.shards = StoredShards(self.prefix, entries, has_modes, remote)
        """Where the samples lie; one shard where the dataset is in one piece."""
        self._fingerprint: str | None = None
        self._check()

    @property
    def kind(self) -> str:
        """The name of the kind of its samples."""
        return self.sample_kind.name

    def __len__(self) -> int:
        return self.shards.num_samples

    def __getitem__(self, index: int) -> RawSample:
        if self.sample_kind.is_plain_text:
            return RawSample({"key": str(index)}, [self.text(index)], [TOKENS])
        shard, number = self.shards.locate(index)
        sequences = shard.sequences
        return RawSample.of_bytes(sequences.take(sequences.document(number)))

    def first_parts(self, index: int, count: int) -> RawSample:
        """A sample of `count` parts beside the JSON one; those behind them are not read."""
        shard, number = self.shards.locate(index)
        found = shard.sequences.document(number)[: 1 + count]
        return RawSample.of_bytes(shard.sequences.take(found))

    def fingerprint(self) -> str:
        """The fingerprint of the dataset's content (fingerprint.py). A dataset in shards has that
        of the joined dataset."""
        if self._fingerprint is None:
            is_one = not self.shards.entries
            self._fingerprint = (
                dataset_fingerprint(self.prefix) if is_one else joined_fingerprint(self.shards)
            )
        return self._fingerprint

    def part_sizes(self, index: int) -> PartSizes:
        """(mode, size) of each part except the JSON one, from the index alone: no data is read.

        Sizes are token ids, or bytes of an image.
        """
        shard, number = self.shards.locate(index)
        index_of = shard.sequences.index
        found = shard.sequences.document(number)
        parts = slice(found.start, found.stop)
        sizes = index_of.lengths[parts].tolist()
        if self.sample_kind.is_plain_text:
            return [(TOKENS, sum(sizes))]
        assert index_of.modes is not None  # of a multimodal dataset
        return [
            (mode, size // TOKEN_BYTES if mode == TOKENS else size)
            for mode, size in zip(index_of.modes[parts].tolist(), sizes, strict=True)
            if mode != JSON
        ]

    def part_lengths(self, indices: np.ndarray, part: int) -> np.ndarray:
        """Token ids of part number `part` of each sample, int64, from the index alone. The JSON
        part, which comes first, is not counted."""
        indices = np.asarray(indices, np.int64)
        found = np.zeros(len(indices), np.int64)
        for shard, places, numbers in self.shards.groups(indices):
            index = shard.sequences.index
            sequences = index.documents[numbers] + 1 + part
            if len(sequences) and not 0 <= sequences.min() <= sequences.max() < len(index.lengths):
                raise InputError(f"{shard.prefix}.idx is damaged: samples without part {part}")
            found[places] = index.lengths[sequences].astype(np.int64) // TOKEN_BYTES
        return found

    def text(self, index: int) -> np.ndarray:
        """Token ids of one document of a text dataset."""
        shard, number = self.shards.locate(index)
        found = shard.sequences.take(shard.sequences.document(number))
        sequences = [ids for ids, _ in found]
        return sequences[0] if len(sequences) == 1 else np.concatenate(sequences)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises InputError unless the token ids were made by this very tokenizer."""
        if self.manifest and self.manifest.tokenizer_fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"{self.prefix} was written with another SentencePiece model (fingerprint "
                f"{self.manifest.tokenizer_fingerprint}, data.tokenizer_model has "
                f"{tokenizer.fingerprint}); preprocess it again or change data.tokenizer_model"
            )

    def sentences(self, tokenizer: Tokenizer) -> SentenceTables:
        """The places where its samples may be cut: mapped from disk or, for datasets of other
        tools, computed in a pass over all tokens."""
        if self.manifest:
            return SentenceTables(self.shards)
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
        table = np.concatenate([np.zeros((0, 2), np.int32), *tables])
        return ComputedSentences(self.shards, table, offsets)

    def _check(self) -> None:
        if self.manifest and self.manifest.num_samples != len(self):
            raise InputError(
                f"{self.prefix}.json counts {self.manifest.num_samples} samples, the index "
                f"{len(self)}; preprocess the dataset again"
            )
        if len(self) == 0:
            raise InputError(f"{self.prefix} holds no samples")
