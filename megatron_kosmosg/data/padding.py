"""Right padding of prompts to rows of one length (`align`, `instruct`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pad_rows(
    tokens: Sequence[np.ndarray], image_masks: Sequence[np.ndarray], pad_to: int, pad_id: int
) -> dict[str, Tensor]:
    """tokens int64, image_mask and padding_mask bool [b, s], s >= pad_to.

    image_mask: True = picture slot. padding_mask: True = padding.
    """
    width = max(pad_to, *(len(row) for row in tokens))
    shape = (len(tokens), width)
    padded, slots = np.full(shape, pad_id, np.int64), np.zeros(shape, bool)
    padding = np.ones(shape, bool)
    for b, (row, mask) in enumerate(zip(tokens, image_masks, strict=True)):
        padded[b, : len(row)], slots[b, : len(row)] = row, mask
        padding[b, : len(row)] = False
    return {
        "tokens": torch.from_numpy(padded),
        "image_mask": torch.from_numpy(slots),
        "padding_mask": torch.from_numpy(padding),
    }
