"""Randomness as a pure function of (seed, stage, stream position, purpose tag).

The position counts samples over all epochs, so a second epoch draws anew; one tag per purpose, so
that two draws of one sample are independent. All draws are made on the CPU.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StreamName:
    """A sample stream, and how it is spelled in the keys of random draws.

    Both spellings are part of the draws of every run, on every rank: they stand here alone.
    """

    stage: str
    split: str
    """train | heldout"""

    @property
    def order_key(self) -> str:
        """The key's stage for the order of samples and for what is drawn while a sample is made."""
        return f"{self.stage}/{self.split}"

    @property
    def noise_key(self) -> str:
        """The key's stage for what the score draws for a sample: timestep, noise, posterior,
        dropped condition."""
        return self.stage if self.split == "train" else f"{self.stage}-{self.split}"


def stream_key(seed: int, stage: str, position: int, tag: str) -> int:
    """A 63-bit key; equal arguments give the equal key on every machine."""
    text = f"{seed}|{stage}|{position}|{tag}".encode()
    digest = hashlib.blake2b(text, digest_size=8, person=b"kosmosg-stream").digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, stage: str, position: int, tag: str) -> np.random.Generator:
    """A fresh NumPy generator for one purpose at one position."""
    return np.random.Generator(np.random.PCG64(stream_key(seed, stage, position, tag)))


def torch_generator(seed: int, stage: str, position: int, tag: str) -> torch.Generator:
    """A fresh CPU torch generator for one purpose at one position."""
    import torch  # kinds of samples, which preprocessing and plans read, need no torch

    generator = torch.Generator(device="cpu")
    generator.manual_seed(stream_key(seed, stage, position, tag))
    return generator


@dataclass(frozen=True)
class SampleKey:
    """The random choices of one sample of one stream."""

    seed: int
    stage: str
    position: int

    def coin(self, tag: str, probability: float) -> bool:
        """True with `probability`; one independent coin per tag."""
        return stream_key(self.seed, self.stage, self.position, tag) < probability * 2**63


class KeyedPermutation:
    """A shuffle of range(n) with random access and no memory: a Feistel network, cycle-walked.

    The network permutes the 2 * half_bits wide numbers; values >= n are sent through it again
    until they fall below n, which keeps the map one to one on range(n).
    """

    ROUNDS = 6

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, not {n}")
        self.n = n
        self._half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._round_keys = np.array(
            [stream_key(key, "permutation", r, "round") for r in range(self.ROUNDS)], np.uint64
        )

    def __getitem__(self, index: int) -> int:
        """The element at `index`, 0 <= index < n."""
        return int(self.take(np.array([index]))[0])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The elements at `indices`, int64 of the same length."""
        values = np.asarray(indices, np.int64)
        if values.size and (values.min() < 0 or values.max() >= self.n):
            raise IndexError(f"indices must lie in [0, {self.n})")
        values = self._encrypt(values.astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for round_key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
