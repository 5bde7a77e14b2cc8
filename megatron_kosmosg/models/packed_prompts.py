"""The prompts of a micro-batch end to end in one row, so that no decoder layer computes padding.

Everything but attention works position by position. Attention is block-diagonal:
TransformerEngine's takes the row as it is ("thd", Megatron's PackedSeqParams); torch's gets the
prompts in blocks, right-padded, which costs what it costs unpacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PackedPrompts(PackedSeqParams):
    """Where b prompts of at most s tokens lie in a row of t positions, of which the last may be
    padding."""

    # All fields of the base class have defaults, so these need some; they are always given.
    index: Tensor = None  # type: ignore[assignment]  # see above
    """int64 [number of tokens]: where each lies in the flattened [b, s]."""
    num_rows: int = 0
    """b."""

    def in_blocks(self, x: Tensor) -> Tensor:
        """A packed row [t, ...] as blocks [b, s, ...], zeros where padding is."""
        blocks = x.new_zeros(self.num_rows * self.max_seqlen_q, *x.shape[1:])
        blocks.index_copy_(0, self.index, x[: len(self.index)])
        return blocks.unflatten(0, (self.num_rows, self.max_seqlen_q))

    def in_a_row(self, blocks: Tensor, length: int) -> Tensor:
        """Blocks [b, s, n] as a packed row [t, n], t = `length`; what is behind the last prompt is
        zero."""
        row = blocks.flatten(0, 1).index_select(0, self.index)
        return F.pad(row, (0, 0, 0, length - len(row)))

    def unpacked(self, hidden: Tensor) -> Tensor:
        """The decoder's output [t, 1, h] -> [s, b, h], zeros where padding is.

        Not a view: where this is sent on, Megatron's schedule frees its storage.
        """
        rows = hidden.new_zeros(self.max_seqlen_q, self.num_rows, hidden.shape[2])
        where = (self.index % self.max_seqlen_q, self.index // self.max_seqlen_q)
        return rows.index_put_(where, hidden[: len(self.index), 0])


def pack_prompts(packed: Tensor, padding_mask: Tensor, multiple: int) -> PackedPrompts:
    """The places of the prompts in one packed row, from `packed` (int64 [tokens], as
    data/padding.py gives it) and padding_mask (bool [b, s], True = padding).

    Args:
        multiple: the row's length is a multiple of it. To kernels what is added for that at the
            end is a prompt of its own: they would leave positions outside of every prompt as they
            find them.
    """
    lengths = (~padding_mask).sum(dim=1, dtype=torch.int32)
    added = -len(packed) % multiple
    if added:
        lengths = F.pad(lengths, (0, 1), value=added)
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    num_rows, longest = padding_mask.shape
    return PackedPrompts(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        index=packed,
        num_rows=num_rows,
    )
