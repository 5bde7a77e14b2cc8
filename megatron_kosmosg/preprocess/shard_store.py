"""What a shard leaves behind for the join: its bytes, and arrays that say what they are.

PREFIX.bin           the parts of its samples, one after the other
PREFIX.npz           ShardIndex
PREFIX.names.jsonl   [source, key] of every sample
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kosmosg.data.kinds.kind import SampleKind
from megatron_kosmosg.data.stored_sample import StoredPart

KEY_TYPE = np.dtype("S16")
_TOGETHER = 4096
Name = tuple[str, str | None]
"""Source of a sample, and its own key if it has one."""


@dataclass
class ShardIndex:
    """Arrays over the samples or the parts of a shard."""

    lengths: np.ndarray
    """int32 [parts], items of the dataset's dtype."""
    modes: np.ndarray
    """int8 [parts]."""
    num_parts: np.ndarray
    """int32 [samples]."""
    sentences: np.ndarray
    """int32 [sentences, 2], see sentences.py."""
    num_sentences: np.ndarray
    """int32 [samples]."""
    num_tokens: np.ndarray
    """int64 [samples]."""
    num_images: np.ndarray
    """int64 [samples]."""
    keys: np.ndarray
    """S16 [samples]: hash of the sample's own key, empty where it has none."""

    @staticmethod
    def read(prefix: str) -> ShardIndex:
        """The index that ShardWriter wrote."""
        with np.load(f"{prefix}.npz") as arrays:
            return ShardIndex(**{name.name: arrays[name.name] for name in fields(ShardIndex)})

    def kept(self, keep: np.ndarray) -> ShardIndex:
        """The samples for which `keep` (bool [samples]) is True."""
        parts = np.repeat(keep, self.num_parts)
        sentences = np.repeat(keep, self.num_sentences)
        return ShardIndex(
            self.lengths[parts],
            self.modes[parts],
            self.num_parts[keep],
            self.sentences[sentences],
            self.num_sentences[keep],
            self.num_tokens[keep],
            self.num_images[keep],
            self.keys[keep],
        )


def key_hash(key: str | None, scope: str = "") -> bytes:
    """The hash by which duplicates are found; keys of different scopes are different."""
    if key is None:
        return b""
    data = key.encode("utf-8", "replace")
    if scope:
        data += b"\0" + scope.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=16).digest()


class ShardWriter:
    """Writes one shard. Arrays of several samples may be added at once."""

    def __init__(self, prefix: str, kind: SampleKind) -> None:
        self._prefix = prefix
        self._itemsize = kind.item_type.itemsize
        self._arrays: dict[str, list[np.ndarray]] = {name.name: [] for name in fields(ShardIndex)}
        self._latest: dict[str, list[np.ndarray]] = {name.name: [] for name in fields(ShardIndex)}
        """Those of up to _TOGETHER calls, whose small arrays take more memory than one does."""
        self.scope = ""
        """Of the keys of what is added: of one scope and key, the first sample stays."""
        self._data = Path(f"{prefix}.bin").open("wb")
        self._names = Path(f"{prefix}.names.jsonl").open("w", encoding="utf-8")
        self.num_samples = self.num_tokens = self.num_images = self.num_bytes = 0

    def add(
        self,
        parts: list[StoredPart],
        sentences: np.ndarray,
        num_tokens: int,
        num_images: int,
        name: Name,
    ) -> None:
        """Adds one sample."""
        for part in parts:
            self.add_bytes(part.data)
        self.add_arrays(
            lengths=np.array([len(part.data) // self._itemsize for part in parts], np.int32),
            modes=np.array([part.mode for part in parts], np.int8),
            num_parts=np.array([len(parts)], np.int32),
            sentences=sentences,
            num_sentences=np.array([len(sentences)], np.int32),
            num_tokens=np.array([num_tokens], np.int64),
            num_images=np.array([num_images], np.int64),
            names=[name],
        )

    def add_bytes(self, data: bytes) -> None:
        """Parts of samples whose arrays `add_arrays` adds."""
        self._data.write(data)
        self.num_bytes += len(data)

    def add_arrays(self, names: list[Name], **arrays: np.ndarray) -> None:
        """The arrays of ShardIndex, but the keys, of samples whose bytes were written."""
        self.num_samples += len(names)
        self.num_tokens += int(arrays["num_tokens"].sum())
        self.num_images += int(arrays["num_images"].sum())
        hashes = [key_hash(key, self.scope) for _, key in names]
        arrays["keys"] = np.array(hashes, KEY_TYPE)
        for name, array in arrays.items():
            self._latest[name].append(array)
        if len(self._latest["keys"]) == _TOGETHER:
            self._gather()
        self._names.writelines(json.dumps(name) + "\n" for name in names)

    def _gather(self) -> None:
        for name, arrays in self._latest.items():
            if arrays:
                self._arrays[name].append(np.concatenate(arrays))
                arrays.clear()

    def finish(self) -> None:
        """Completes the files of the shard."""
        self._gather()
        self._data.close()
        self._names.close()
        empty = {
            "lengths": np.zeros(0, np.int32),
            "modes": np.zeros(0, np.int8),
            "num_parts": np.zeros(0, np.int32),
            "sentences": np.zeros((0, 2), np.int32),
            "num_sentences": np.zeros(0, np.int32),
            "num_tokens": np.zeros(0, np.int64),
            "num_images": np.zeros(0, np.int64),
            "keys": np.zeros(0, KEY_TYPE),
        }
        # Any: numpy also has options of its own there, of other types and names.
        arrays: dict[str, Any] = {
            name: np.concatenate([first, *self._arrays[name]]) for name, first in empty.items()
        }
        np.savez(f"{self._prefix}.npz", **arrays)


def read_names(prefix: str) -> list[tuple[str, str]]:
    """(source, key) of each sample of a shard; the key of one that has none is its source."""
    with Path(f"{prefix}.names.jsonl").open(encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    return [(source, source if key is None else key) for source, key in pairs]
