"""How sure a segmenter is of each pixel -> the region of an entity, and the square around it.

The authors' builder: threshold 0.3, dilation by a hundredth of the height, the largest connected
component, and a square around it that is shifted inside the image. Here the map is enlarged
before the threshold, which gives smoother edges than after it.
"""

from __future__ import annotations

import numpy as np

from megatron_kosmosg.data.kinds.record import Rejected

WINDOW_SHARE = 100
"""A region grows by a window of this share of the image's height: a hundredth."""


def entity_region(probability: np.ndarray, threshold: float) -> np.ndarray:
    """The region where the map float [h, w] exceeds the threshold, grown and reduced to its largest
    connected part: bool [h, w]. Raises Rejected where it is empty."""
    over = probability > threshold
    if not over.any():
        raise Rejected("mask is empty", f"the largest value is {probability.max():.3f}")
    return largest_component(dilated(over, max(1, len(over) // WINDOW_SHARE)))


def dilated(region: np.ndarray, window: int) -> np.ndarray:
    """For each pixel, whether a window x window square around it meets the region: bool [h, w]."""
    before, after = window // 2, window - window // 2 - 1
    for axis in (0, 1):
        margin = [(0, 0), (0, 0)]
        margin[axis] = (before + 1, after)
        counts = np.cumsum(np.pad(region, margin).astype(np.int32), axis=axis)
        length = region.shape[axis]
        last = np.take(counts, range(window, window + length), axis)
        region = last > np.take(counts, range(length), axis)
    return region


def largest_component(region: np.ndarray) -> np.ndarray:
    """The largest part of the region whose pixels touch along edges: bool [h, w].

    Of equally large parts the one that begins higher up.
    """
    runs = _runs(region)
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0
    for i, (row, start, end) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= start):
            above += 1
        j = above
        while j < i and runs[j][0] == row - 1 and runs[j][1] < end:
            a, b = sorted((root(i), root(j)))
            parent[b] = a
            j += 1
    sizes: dict[int, int] = {}
    for i, (_, start, end) in enumerate(runs):
        sizes[root(i)] = sizes.get(root(i), 0) + end - start
    best = max(sizes, key=lambda part: sizes[part])
    component = np.zeros_like(region)
    for i, (row, start, end) in enumerate(runs):
        if root(i) == best:
            component[row, start:end] = True
    return component


def square_around(region: np.ndarray) -> tuple[int, int, int]:
    """(left, top, side) of the square around a region of a square image; it lies inside the
    image."""
    rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    height, width = (int(line[-1] - line[0]) + 1 for line in (rows, columns))
    side = max(height, width)
    left = int(columns[0]) - (side - width) // 2
    top = int(rows[0]) - (side - height) // 2
    last = len(region) - side
    return min(max(left, 0), last), min(max(top, 0), last), side


def _runs(region: np.ndarray) -> list[tuple[int, int, int]]:
    """(row, start, end) of each stretch of set pixels, row by row."""
    edges = np.diff(np.pad(region.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    return list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
