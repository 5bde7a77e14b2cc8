"""Reads PREFIX.bin/.idx from the format's description alone: no code of ours, none of Megatron."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from megatron_kosmosg.data.tokenizer import Tokenizer

TOKENS, IMAGE, JSON = 0, 1, 2


def read_samples(prefix: str | Path, has_modes: bool = True) -> list[list[tuple[int, bytes]]]:
    """The (mode, bytes) of every part of every sample; mode 0 where there are no modes."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    magic, version, code, sequences, documents = struct.unpack("<9sQBQQ", index[:34])
    assert magic == b"MMIDIDX\x00\x00" and version == 1
    itemsize = {1: 1, 4: 4}[code]
    at = 34
    lengths = np.frombuffer(index, "<i4", sequences, at)
    at += 4 * sequences
    pointers = np.frombuffer(index, "<i8", sequences, at)
    at += 8 * sequences
    ends = np.frombuffer(index, "<i8", documents, at)
    at += 8 * documents
    modes = np.frombuffer(index, "i1", sequences, at) if has_modes else np.zeros(sequences, "i1")
    assert len(index) == at + (sequences if has_modes else 0)
    parts = [
        (int(mode), data[start : start + int(length) * itemsize])
        for mode, start, length in zip(modes, pointers.tolist(), lengths, strict=True)
    ]
    return [parts[a:b] for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def info_of(sample: list[tuple[int, bytes]]) -> dict:
    return json.loads(sample[0][1])


def images_of(sample: list[tuple[int, bytes]]) -> list[bytes]:
    return [data for mode, data in sample if mode == IMAGE]


def texts_of(sample: list[tuple[int, bytes]], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(np.frombuffer(data, "<i4")) for mode, data in sample if mode == TOKENS]


def outline(sample: list[tuple[int, bytes]], tokenizer: Tokenizer) -> list[str | bytes]:
    """Texts and images in the order in which they are stored."""
    return [
        tokenizer.decode(np.frombuffer(data, "<i4")) if mode == TOKENS else data
        for mode, data in sample
        if mode != JSON
    ]
