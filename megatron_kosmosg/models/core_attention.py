"""softmax(q k^T) v through torch's scaled_dot_product_attention, in Megatron's module contract."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kosmosg.models.packed_prompts import PackedPrompts
from megatron_kosmosg.parallel.seeds import rng_tracker


def additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores, made once for all layers of a stack: minus infinity where
    `hidden`, a bool tensor, is True. dtype: of the queries."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))


class CoreAttention(MegatronModule):
    """Attention of this rank's heads; flash kernels where torch has them."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused_by_this_implementation,
    ) -> None:
        super().__init__(config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedPrompts | None = None,
    ) -> torch.Tensor:
        """Attention of query [sq, b, heads, hn] over key and value [sk, b, heads, hn] -> [sq, b,
        heads*hn].

        Args:
            attention_mask: broadcastable to [b, heads, sq, sk], as `additive` gives it; ignored by
                causal attention.
            packed_seq_params: query, key and value are [t, heads, hn] and the result [t, heads*hn];
                causal attention alone has it.
        """
        if attention_bias is not None:
            raise NotImplementedError("this attention has no bias")
        is_causal = attn_mask_type is AttnMaskType.causal
        if packed_seq_params is not None:
            length = len(query)
            query, key, value = (
                packed_seq_params.in_blocks(x).transpose(0, 1) for x in (query, key, value)
            )
        hidden = None if is_causal else attention_mask
        dropout = self.config.attention_dropout if self.training else 0.0
        # Heads are split over ranks, so each rank drops with the tracker's own stream. Under
        # sequence parallelism the whole block runs in that stream already.
        forks = dropout > 0 and not self.config.sequence_parallel
        with rng_tracker().fork() if forks else nullcontext():
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=hidden,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.softmax_scale,
            )
        if packed_seq_params is not None:
            return packed_seq_params.in_a_row(context.transpose(1, 2).flatten(2), length)
        return context.permute(2, 0, 1, 3).flatten(2)
