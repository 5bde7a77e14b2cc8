"""The order in which the samples of one dataset are drawn: reshuffled every epoch by key."""

from __future__ import annotations

import numpy as np

from megatron_kosmosg.data.random_keys import KeyedPermutation, stream_key

BLOCK = 4096
"""Places of an epoch that are shuffled together; draws follow one another closely."""


class SampleOrder:
    """Sample indices of a dataset by how often it was drawn; random access."""

    def __init__(self, name: str, num_samples: int, seed: int, stage: str) -> None:
        self._name, self._num_samples = name, num_samples
        self._seed, self._stage = seed, stage
        self._latest: tuple[int, int, np.ndarray] = (-1, 0, np.zeros(0, np.int64))
        """(epoch, block, its samples); replaced as a whole, so that threads may share it."""

    def epoch(self, epoch: int) -> KeyedPermutation:
        """The shuffle of one pass over the dataset."""
        return KeyedPermutation(self._num_samples, self.epoch_key(epoch))

    def epoch_key(self, epoch: int) -> int:
        """What the shuffle of `epoch` depends on beside the number of samples."""
        return stream_key(self._seed, self._stage, epoch, f"order/{self._name}")

    def __getitem__(self, ordinal: int) -> int:
        """The sample index of draw number `ordinal`, counted over all epochs."""
        epoch, place = divmod(ordinal, self._num_samples)
        block, offset = divmod(place, BLOCK)
        latest = self._latest
        if latest[:2] != (epoch, block):
            stop = min((block + 1) * BLOCK, self._num_samples)
            samples = self.epoch(epoch).take(np.arange(block * BLOCK, stop))
            latest = self._latest = (epoch, block, samples)
        return int(latest[2][offset])

    def take(self, ordinals: np.ndarray) -> np.ndarray:
        """The sample indices of the draws `ordinals`, int64 of the same length."""
        epochs, places = np.divmod(np.asarray(ordinals, np.int64), self._num_samples)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            samples[epochs == epoch] = self.epoch(epoch).take(places[epochs == epoch])
        return samples

    def replacement(self, ordinal: int, position: int, index: int) -> int:
        """The sample with replacement index `index` for draw `ordinal`, at stream `position`.

        0 is the drawn sample itself. Whoever finds a sample unusable goes on to the next index;
        these are other samples, chosen by key without repetition, so that all ranks that know the
        index of a position read the same sample there.
        """
        drawn = self[ordinal]
        others = self._num_samples - 1
        if index == 0 or others == 0:
            return drawn
        key = stream_key(self._seed, self._stage, position, f"replacement/{self._name}")
        other = KeyedPermutation(others, key)[(index - 1) % others]
        return other if other < drawn else other + 1
