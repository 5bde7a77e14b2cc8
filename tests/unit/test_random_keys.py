"""Keyed randomness: independent per argument, the same everywhere."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.random_keys import (
    KeyedPermutation,
    SampleKey,
    numpy_generator,
    stream_key,
    torch_generator,
)


def test_key_depends_on_every_argument_and_nothing_else():
    base = (3, "instruct", 17, "epsilon")
    others = [(4, *base[1:]), (3, "align", *base[2:]), (3, "instruct", 18, "epsilon")]
    others.append((3, "instruct", 17, "posterior"))
    keys = {stream_key(*arguments) for arguments in [base, *others]}
    assert len(keys) == 5
    assert stream_key(*base) == stream_key(*base)
    assert all(0 <= key < 2**63 for key in keys)


def test_key_is_a_documented_hash():
    digest = hashlib.blake2b(b"0|train|1|x", digest_size=8, person=b"kosmosg-stream").digest()
    assert stream_key(0, "train", 1, "x") == int.from_bytes(digest, "little") // 2


def test_generators_repeat_and_differ_by_position():
    draws = [torch.randn(4, generator=torch_generator(0, "s", p, "t")) for p in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    a, b = (numpy_generator(0, "s", 5, tag).random(4) for tag in ("t", "u"))
    assert not np.array_equal(a, b)


def test_coin_follows_its_probability():
    rate = np.mean([SampleKey(0, "s", p).coin("drop", 0.3) for p in range(4000)])
    assert abs(rate - 0.3) < 0.03
    assert not SampleKey(0, "s", 0).coin("drop", 0.0) and SampleKey(0, "s", 0).coin("drop", 1.0)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permutation_is_one_to_one(n):
    permutation = KeyedPermutation(n, 11)
    values = permutation.take(np.arange(n))
    assert sorted(values.tolist()) == list(range(n))
    assert [permutation[i] for i in range(0, n, 97)] == values[::97].tolist()


def test_permutation_mixes_and_depends_on_the_key():
    n = 5000
    a, b = (KeyedPermutation(n, key).take(np.arange(n)) for key in (1, 2))
    assert (a == b).mean() < 0.01
    # Rank correlation with the identity of a uniform shuffle has deviation 1/sqrt(n).
    assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
    # First elements over many keys are spread evenly (chi-square over 10 bins, 9 degrees).
    firsts = np.array([KeyedPermutation(100, key)[0] for key in range(2000)])
    counts = np.bincount(firsts // 10, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 30


def test_permutation_refuses_indices_outside():
    with pytest.raises(IndexError):
        KeyedPermutation(5, 0)[5]


def test_order_reshuffles_each_epoch_and_replacements_are_other_samples():
    order = SampleOrder("captions", 9, seed=1, stage="instruct/train")
    epochs = [[order[9 * epoch + i] for i in range(9)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    tried = [order.replacement(5, position=40, index=a) for a in range(9)]
    assert tried[0] == order[5] and sorted(tried) == list(range(9))
    assert tried != [order.replacement(5, position=41, index=a) for a in range(9)]
    assert SampleOrder("one", 1, 0, "s").replacement(0, 0, 3) == 0
