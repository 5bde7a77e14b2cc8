"""Where packed prompts lie in their row, as TransformerEngine and as torch's attention are told."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_kosmosg.models.packed_prompts import pack_prompts

PADDING = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
PACKED = (~PADDING).flatten().nonzero().flatten()


def test_every_prompt_begins_where_the_one_before_ends() -> None:
    prompts = pack_prompts(PACKED, PADDING, multiple=1)
    assert prompts.qkv_format == "thd"
    assert prompts.cu_seqlens_q.tolist() == prompts.cu_seqlens_kv.tolist() == [0, 3, 4, 8]
    assert prompts.cu_seqlens_q.dtype == torch.int32
    assert prompts.max_seqlen_q == prompts.max_seqlen_kv == 4


def test_what_fills_the_row_up_is_a_prompt_of_its_own() -> None:
    assert pack_prompts(PACKED, PADDING, multiple=3).cu_seqlens_q.tolist() == [0, 3, 4, 8, 9]
    assert pack_prompts(PACKED, PADDING, multiple=2).cu_seqlens_q.tolist() == [0, 3, 4, 8]


def test_other_settings_of_megatron_stay_at_their_defaults() -> None:
    """TransformerEngine's attention is handed each field of Megatron's class."""
    known = {"qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"}
    prompts, defaults = pack_prompts(PACKED, PADDING, multiple=1), PackedSeqParams()
    for field in dataclasses.fields(PackedSeqParams):
        if field.name not in known:
            assert getattr(prompts, field.name) == getattr(defaults, field.name), field.name


@pytest.mark.parametrize("added", [0, 2])
def test_blocks_and_the_row_hold_the_same(added: int) -> None:
    prompts = pack_prompts(PACKED, PADDING, multiple=1)
    row = torch.arange(1.0, 9 + added).repeat(2, 1).T.requires_grad_()  # [t, 2]
    blocks = prompts.in_blocks(row)
    assert blocks[..., 0].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]]
    assert torch.equal(prompts.in_a_row(blocks, 8 + added)[:8], row[:8])
    hidden = prompts.unpacked(row[:, None])
    assert torch.equal(hidden.transpose(0, 1), blocks)
    assert hidden.is_contiguous() and hidden._base is None  # Megatron frees what is sent
    (gradient,) = torch.autograd.grad(blocks.square().sum() + hidden.sum(), row)
    expected = 2 * row.detach() + 1
    expected[8:] = 0
    assert torch.equal(gradient, expected)
