"""Which dataset stands at which stream position: the weights, followed to within one sample.

Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980): at every
prefix of length t, dataset i has been drawn within 1 - 1/(2k-2) of w_i * t times.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from megatron_kosmosg.config.errors import ConfigError

MAX_PERIOD = 4_000_000


@dataclass(frozen=True)
class BlendedSample:
    """The dataset at one stream position, and how often it was drawn before."""

    name: str
    ordinal: int


class Blend:
    """A mixture of named datasets with positive weights; random access, no state.

    The pattern repeats with the common denominator of the weights as its period.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        if not weights:
            raise ConfigError("the mixture is empty; add data.blend.NAME.path")
        bad = [f"{name}={weight}" for name, weight in weights.items() if not weight > 0]
        if bad:
            raise ConfigError(f"data.blend weights must be positive, not {', '.join(bad)}")
        self.names = list(weights)
        # str() first: 0.2 means two tenths, not the nearest binary number.
        fractions = [Fraction(str(weight)) for weight in weights.values()]
        common = lcm(*(fraction.denominator for fraction in fractions))
        shares = [int(fraction * common) for fraction in fractions]
        divisor = gcd(*shares)
        self._shares = [share // divisor for share in shares]
        self.period = sum(self._shares)
        if self.period > MAX_PERIOD:
            raise ConfigError(
                f"data.blend weights {weights} have a common period of {self.period} samples; "
                "give weights with fewer digits"
            )
        self._pattern = _chairman_assignment(self._shares)
        self._ordinals = np.zeros(self.period, np.int64)
        for i in range(len(self.names)):
            places = np.flatnonzero(self._pattern == i)
            self._ordinals[places] = np.arange(len(places))

    def __getitem__(self, position: int) -> BlendedSample:
        """The draw at stream position `position`."""
        period, place = divmod(position, self.period)
        i = int(self._pattern[place])
        return BlendedSample(self.names[i], period * self._shares[i] + int(self._ordinals[place]))

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The draws at `positions` as (index into `names`, ordinal within that dataset), both int64
        of the length of `positions`."""
        periods, places = np.divmod(np.asarray(positions, np.int64), self.period)
        which = self._pattern[places].astype(np.int64)
        return which, periods * np.array(self._shares, np.int64)[which] + self._ordinals[places]


def _chairman_assignment(shares: list[int]) -> np.ndarray:
    """The index of the dataset drawn at each place of one period, int32 [sum of shares]."""
    period, k = sum(shares), len(shares)
    if k == 1:
        return np.zeros(period, np.int32)
    drawn = [0] * k
    pattern = np.zeros(period, np.int32)
    slack = Fraction(1, 2 * k - 2)
    # All in integers, scaled by period * slack.denominator, because equality decides.
    scale = slack.denominator
    for t in range(1, period + 1):
        best, best_deadline = -1, (0, 1)
        for i, share in enumerate(shares):
            if (share * t - drawn[i] * period) * scale < period:
                continue
            deadline = ((drawn[i] + 1) * scale - 1, share)
            if best < 0 or deadline[0] * best_deadline[1] < best_deadline[0] * deadline[1]:
                best, best_deadline = i, deadline
        pattern[t - 1] = best
        drawn[best] += 1
    return pattern
