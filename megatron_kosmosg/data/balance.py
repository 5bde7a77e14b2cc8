"""Which samples of a global batch go to which rank and micro-batch: long ones beside long ones.

A micro-batch is padded to its longest row and an update waits for the slowest rank. Samples are
sorted by length and dealt to the ranks in turn, there and back, so that all ranks hold nearly the
same number of tokens and the micro-batches they compute at the same time are alike. The set of
samples stays, and so, up to rounding, does a loss that is a mean over the global batch.
"""

from __future__ import annotations

import numpy as np


def in_stream_order(num_samples: int, micro_batch_size: int, dp_size: int) -> np.ndarray:
    """Places in the global batch for each rank and micro-batch, dealt in order: int64 [dp_size,
    micro-batches, micro_batch_size]."""
    places = np.arange(num_samples).reshape(-1, dp_size, micro_batch_size)
    return places.transpose(1, 0, 2)


def by_length(lengths: np.ndarray, micro_batch_size: int, dp_size: int) -> np.ndarray:
    """Places in the global batch for each rank and micro-batch, balanced by length: int64 [dp_size,
    micro-batches, micro_batch_size].

    Args:
        lengths: of the samples of the global batch, int64 [n]. Equal lengths keep the stream's
            order.
    """
    deal = np.argsort(-lengths, kind="stable").reshape(-1, dp_size)
    deal[1::2] = deal[1::2, ::-1]
    return deal.T.reshape(dp_size, -1, micro_batch_size)


def row_share(num_rows: int, index: int, parts: int) -> slice:
    """Part `index` of `parts` of a micro-batch's rows; sizes differ by at most one, may be zero."""
    size, extra = divmod(num_rows, parts)
    start = index * size + min(index, extra)
    return slice(start, start + size + (index < extra))
