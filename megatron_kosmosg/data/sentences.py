"""Where a document may be cut for packing: the lengths of its sentences.

A sentence is counted as (text tokens, images), without <s> and </s>, so that the table does not
depend on how many positions an image takes. An image belongs to the sentence it stands in, and
one that stands before a sentence belongs to that sentence: a caption is never parted from its
image by a cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_kosmosg.data.tokenizer import Tokenizer


def sentence_table(content: Sequence[np.ndarray | None], tokenizer: Tokenizer) -> np.ndarray:
    """The sentences of a document, int32 [sentences, 2] of (text tokens, images). In `content`
    text is given by its ids and an image by None."""
    rows: list[tuple[int, int]] = []
    tokens = images = 0
    for part in content:
        if part is None:
            images += 1
            continue
        cuts = np.flatnonzero(tokenizer.sentence_ends(part)) + 1
        start = 0
        for cut in cuts.tolist():
            rows.append((tokens + cut - start, images))
            tokens, images, start = 0, 0, cut
        tokens += len(part) - start
    if tokens or images:
        rows.append((tokens, images))
    return np.array(rows, np.int32).reshape(-1, 2)


def sentence_paths(prefix: str | Path) -> tuple[Path, Path]:
    """The sentence table and the offsets of each sample in it."""
    return Path(f"{prefix}.sentences.npy"), Path(f"{prefix}.sentence_offsets.npy")
