"""Absolute positions: fairseq's sinusoids for the decoder, and where each token stands.

The decoder has no rotary positions or xPos: the released model builds them and never uses them.
"""

from __future__ import annotations

import math

import torch

PADDING_INDEX = 1
"""Position of padding; the first token stands at PADDING_INDEX + 1."""


def position_indices(padding_mask: torch.Tensor) -> torch.Tensor:
    """Row of the position table for every token: 2, 3, ... for tokens, 1 for padding.

    Args:
        padding_mask: bool [b, s], True = padding.
    """
    is_token = (~padding_mask).long()
    return is_token.cumsum(dim=1) * is_token + PADDING_INDEX


def sinusoid_table(num_rows: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """The table of positions, float32 [num_rows, width]: sines in the first half, cosines in the
    second; row 1 is zero.

    Frequencies are exp(-i ln(10000) / (width/2 - 1)), i < width/2.
    """
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=device) * -(math.log(10000) / (half - 1))
    )
    angles = torch.arange(num_rows, dtype=torch.float32, device=device)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    if width % 2:
        table = torch.nn.functional.pad(table, (0, 1))
    table[PADDING_INDEX] = 0
    return table


class SinusoidalPositions:
    """A float32 table that grows on demand.

    Not a module or a buffer: a cast of the model to half precision must not round it.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._table: torch.Tensor | None = None

    def __call__(
        self, padding_mask: torch.Tensor, packed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The positions' embeddings, float32 [b, s, width], for padding_mask bool [b, s], True =
        padding.

        Args:
            packed: int64 [t], places in the flattened [b, s]; then [1, t, width], of these alone.
        """
        rows = padding_mask.shape[1] + PADDING_INDEX + 1
        table = self._table
        if table is None or len(table) < rows or table.device != padding_mask.device:
            table = sinusoid_table(
                2 ** math.ceil(math.log2(rows)), self._width, padding_mask.device
            )
            self._table = table
        indices = position_indices(padding_mask)
        if packed is not None:
            indices = indices.flatten()[packed][None]
        return torch.nn.functional.embedding(indices, table)
