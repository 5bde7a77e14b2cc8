"""Both ends of the multimodal language model: what enters its decoder, and the tied output head.

Order on the way in, as in the released model: token embeddings, image features written over the
image slots, everything times sqrt(h), sinusoidal positions, dropout.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size

from megatron_kosmosg.models.positions import SinusoidalPositions
from megatron_kosmosg.parallel.platform import has_fused_weight_gradient_kernel
from megatron_kosmosg.parallel.seeds import rng_tracker

_ROW_MULTIPLE = 128
"""Padding of the vocabulary (matrix tiles). A power of two, so that tensor-parallel sizes 1, 2, 4,
... 128 all give tables of one size, and checkpoints of one shape."""


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Number of rows of the embedding over all ranks: the vocabulary, padded to a number that the
    tensor ranks can divide."""
    multiple = math.lcm(_ROW_MULTIPLE, tp_size)
    return -(-vocab_size // multiple) * multiple


def _init_method(config: TransformerConfig) -> Callable[..., Any]:
    """The embedding's and the head's. Megatron's config fills it in, which its annotation leaves
    open."""
    return cast(Callable[..., Any], config.embedding_init_method)


class MultimodalEmbedding(MegatronModule):
    """Tokens and image features -> [s, b, h], or this rank's [s/tp, b, h] of it."""

    def __init__(
        self, config: TransformerConfig, vocab_size: int, process_groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.tp_group = process_groups.tp
        self.word_embeddings = VocabParallelEmbedding(
            padded_vocab_size(vocab_size, get_pg_size(self.tp_group)),
            config.hidden_size,
            init_method=_init_method(config),
            config=config,
            tp_group=self.tp_group,
        )
        self._positions = SinusoidalPositions(config.hidden_size)

    def forward(
        self,
        tokens: torch.Tensor,
        image_mask: torch.Tensor,
        padding_mask: torch.Tensor,
        image_embeddings: torch.Tensor,
        packed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The decoder's input. tokens, image_mask (True = image slot) and padding_mask (True =
        padding) are [b, s].

        Args:
            image_embeddings: [n, q, h], filling the slots in row-major order over (b, s).
            packed: int64 [t], where the tokens lie in the flattened [b, s]; they come out as one
                row, [t, 1, h].

        Raises ValueError when the number of image embeddings is not that of the slots.
        """
        if packed is not None:
            tokens, image_mask = (x.flatten()[packed][None] for x in (tokens, image_mask))
        embeddings = self.word_embeddings(tokens)
        slots = image_mask.sum()
        count = image_embeddings.shape[0] * image_embeddings.shape[1]
        if slots.is_cuda:  # no wait for the device; the error then lacks the numbers
            torch._assert_async(slots == count)
        elif slots != count:
            raise ValueError(
                f"the batch has {int(slots)} image slots, but {image_embeddings.shape[0]} images "
                f"of {image_embeddings.shape[1]} slots each"
            )
        # By place: the backward pass of a mask asks the device how many there are.
        places = image_mask.flatten().byte().sort(descending=True, stable=True).indices[:count]
        images = image_embeddings.to(embeddings.dtype).flatten(0, 1)
        embeddings = embeddings.flatten(0, 1).index_copy(0, places, images).view_as(embeddings)
        positions = self._positions(padding_mask, packed).to(embeddings.dtype)
        hidden = torch.add(positions, embeddings, alpha=math.sqrt(self.config.hidden_size))
        hidden = hidden.transpose(0, 1).contiguous()
        if not self.config.sequence_parallel:
            return F.dropout(hidden, self.config.hidden_dropout, self.training)
        hidden = F.pad(hidden, (0, 0, 0, 0, 0, -hidden.shape[0] % get_pg_size(self.tp_group)))
        hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        with rng_tracker().fork():
            return F.dropout(hidden, self.config.hidden_dropout, self.training)


class OutputHead(ColumnParallelLinear):
    """Maps hidden states [s, b, h] to the logits of this rank's vocabulary shard, with the
    embedding's weight.

    On the embedding's own pipeline stage it has no weight and is handed the embedding's; elsewhere
    it holds a copy that Megatron keeps equal. It is Megatron-Core's own linear beside
    TransformerEngine's layers, too, and without apex then adds no gradient into its buffer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        process_groups: ProcessGroupCollection,
        holds_weight: bool,
    ) -> None:
        tp_group = process_groups.tp
        padded = padded_vocab_size(vocab_size, get_pg_size(tp_group))
        own = copy.copy(config)
        own.gradient_accumulation_fusion &= has_fused_weight_gradient_kernel()
        super().__init__(
            config.hidden_size,
            padded,
            config=own,
            init_method=_init_method(config),
            bias=False,
            skip_weight_param_allocation=not holds_weight,
            tp_group=tp_group,
        )
        # Its input is complete on every rank, also when the decoder splits the sequence.
        self.sequence_parallel = False
        self.allreduce_dgrad = get_pg_size(tp_group) > 1
        first_row = get_pg_rank(tp_group) * self.output_size_per_partition
        self._num_tokens_here = max(0, min(vocab_size - first_row, self.output_size_per_partition))

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """The logits [s, b, v/tp] of hidden [s, b, h]; padding rows of the vocabulary are minus
        infinity."""
        logits, _ = super().forward(hidden, weight=weight)
        if self._num_tokens_here < self.output_size_per_partition:
            # A loss gives minus infinity no gradient, so autograd, which would copy all, need not.
            logits.detach()[..., self._num_tokens_here :] = float("-inf")
        return logits
