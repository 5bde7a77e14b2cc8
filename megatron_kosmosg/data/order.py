"""The order in which the samples of one dataset are drawn: reshuffled every epoch by key."""

from __future__ import annotations

from megatron_kosmosg.data.keyed import KeyedPermutation, stream_key


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

    def candidate(self, ordinal: int, position: int, attempt: int) -> int:
        """The sample for draw `ordinal`, which stands at stream `position`.

        Attempt 0 is the sample itself; later ones are others, drawn by key without repetition.
        """
        own = self[ordinal]
        others = self._num_samples - 1
        if attempt == 0 or others == 0:
            return own
        key = stream_key(self._seed, self._stage, position, f"replacement/{self._name}")
        index = KeyedPermutation(others, key)[(attempt - 1) % others]
        return index if index < own else index + 1
