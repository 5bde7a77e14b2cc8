"""Right padding of prompts to rows of one length (`align`, `instruct`), and where they are packed
without it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pad_rows(
    tokens: Sequence[np.ndarray],
    image_masks: Sequence[np.ndarray],
    pad_to: int,
    pad_id: int,
    *,
    packs: bool = False,
) -> dict[str, Tensor]:
    """The prompts in rows [b, s], s >= pad_to: tokens int64, image_mask and padding_mask bool.

    image_mask: True = image slot. padding_mask: True = padding. With `packs` also `packed` int64
    [t]: where each of the t tokens lies in the flattened [b, s], ascending. It is made here, on the
    host, because its length is the length of the decoder's row.
    """
    width = max(pad_to, *(len(row) for row in tokens))
    shape = (len(tokens), width)
    padded, slots = np.full(shape, pad_id, np.int64), np.zeros(shape, bool)
    padding = np.ones(shape, bool)
    for b, (row, mask) in enumerate(zip(tokens, image_masks, strict=True)):
        padded[b, : len(row)], slots[b, : len(row)] = row, mask
        padding[b, : len(row)] = False
    rows = {"tokens": padded, "image_mask": slots, "padding_mask": padding}
    if packs:
        rows["packed"] = np.flatnonzero(~padding)
    return {name: torch.from_numpy(values) for name, values in rows.items()}
