"""The order in which the samples of one dataset are drawn: reshuffled every epoch by key."""

from __future__ import annotations

from megatron_kosmosg.data.keyed import KeyedPermutation, numpy_generator, stream_key


class SampleOrder:
    """Sample indices of a dataset by how often it was drawn; random access."""

    def __init__(self, name: str, num_samples: int, seed: int, stage: str) -> None:
        self._name, self._num_samples = name, num_samples
        self._seed, self._stage = seed, stage
        self._latest: tuple[int, KeyedPermutation] | None = None

    def epoch(self, epoch: int) -> KeyedPermutation:
        """The shuffle of one pass over the dataset."""
        latest = self._latest
        if latest is None or latest[0] != epoch:
            key = stream_key(self._seed, self._stage, epoch, f"order/{self._name}")
            latest = self._latest = (epoch, KeyedPermutation(self._num_samples, key))
        return latest[1]

    def __getitem__(self, ordinal: int) -> int:
        """The sample index of draw number `ordinal`, counted over all epochs."""
        epoch, place = divmod(ordinal, self._num_samples)
        return self.epoch(epoch)[place]

    def replacement(self, position: int, attempt: int) -> int:
        """The sample that stands in at stream position `position`; attempts count from 1."""
        tag = f"replacement/{self._name}/{attempt}"
        generator = numpy_generator(self._seed, self._stage, position, tag)
        return int(generator.integers(self._num_samples))
