"""Few cases in which every two values of different factors meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Choice = dict[str, str]
"""{factor: value}."""


def pairwise(
    factors: Mapping[str, Sequence[str]], is_valid: Callable[[Choice], bool]
) -> list[Choice]:
    """Valid choices that cover every pair which any valid choice has; the same for the same input.

    Greedy: the next is the one with most pairs that are not covered yet.
    """
    every = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    pairs = {index: _pairs(choice) for index, choice in enumerate(every) if is_valid(choice)}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(pairs, key=lambda index: (len(pairs[index] & missing), -index))
        chosen.append(every[best])
        missing -= pairs[best]
    return chosen


def _pairs(choice: Choice) -> set[tuple]:
    return set(combinations(choice.items(), 2))
