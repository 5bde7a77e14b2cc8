"""AlignerNet (paper section 2.2): M maps decoder states to the text encoder's space, N back.

M: states -> encoder -> 77 queries that cross-attend to it. N: one query per position that
cross-attend to M's output -> encoder -> states. Variants of the paper's Table 2: `decoder_only`
has no encoders, `none` is one linear map per position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.core_attention import additive
from megatron_kosmosg.models.layer_specs import (
    bidirectional_layer,
    block_spec,
    cross_attention_layer,
)
from megatron_kosmosg.models.mcore_configs import aligner_config

POSITION_OFFSET = 2
"""Position t reads row t + 2 of a learned position table (fairseq's layout)."""


def build_aligner_m(config: RunConfig, process_groups: ProcessGroupCollection) -> nn.Module:
    """M of `model.aligner.kind`: forward(hidden [b, s, h], padding_mask [b, s]) -> [b, c, d]."""
    kind = config.model.aligner.kind
    return LinearM(config) if kind == "none" else AlignerM(config, process_groups)


def build_aligner_n(config: RunConfig, process_groups: ProcessGroupCollection) -> nn.Module:
    """N of `model.aligner.kind`: forward(condition [b, c, d], s, padding_mask) -> [b, s, h]."""
    kind = config.model.aligner.kind
    return LinearN(config) if kind == "none" else AlignerN(config, process_groups)


class AlignerM(MegatronModule):
    """Decoder states of any length -> a fixed number of condition vectors."""

    def __init__(self, config: RunConfig, process_groups: ProcessGroupCollection) -> None:
        super().__init__(aligner_config(config))
        self.tp_group = process_groups.tp
        aligner = config.model.aligner
        self.input_projection = nn.Linear(config.model.decoder.hidden_size, aligner.hidden_size)
        self.positions = LearnedPositions(aligner.max_positions, aligner.hidden_size)
        if aligner.kind == "full":
            self.encoder = _encoder(self.config, process_groups)
        else:
            self.encoder = None
        self.query = nn.Parameter(torch.empty(aligner.num_queries, aligner.hidden_size))
        self.decoder = _decoder(self.config, process_groups)

    def forward(self, hidden: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        """The condition [b, c, d] of hidden states [b, s, h]; padding_mask is bool [b, s], True =
        padding.

        Padding has no influence on the result.
        """
        states = self.positions(self.input_projection(hidden))
        states = states.masked_fill(padding_mask.unsqueeze(-1), 0).transpose(0, 1).contiguous()
        hidden_keys = additive(padding_mask[:, None, None, :], states.dtype)
        if self.encoder is not None:
            states = self.encoder(states, attention_mask=hidden_keys)
        queries = self.query[:, None].expand(-1, hidden.shape[0], -1).contiguous()
        condition = self.decoder(
            queries, attention_mask=None, context=states, context_mask=hidden_keys
        )
        return condition.transpose(0, 1)


class AlignerN(MegatronModule):
    """Condition vectors -> the decoder states they came from; only `align` has it."""

    def __init__(self, config: RunConfig, process_groups: ProcessGroupCollection) -> None:
        super().__init__(aligner_config(config))
        self.tp_group = process_groups.tp
        aligner = config.model.aligner
        self.query = nn.Parameter(torch.empty(aligner.max_positions, aligner.hidden_size))
        self.decoder = _decoder(self.config, process_groups)
        if aligner.kind == "full":
            self.positions = LearnedPositions(aligner.max_positions, aligner.hidden_size)
            self.encoder = _encoder(self.config, process_groups)
        else:
            self.positions = self.encoder = None
        self.output_projection = nn.Linear(aligner.hidden_size, config.model.decoder.hidden_size)

    def forward(
        self, condition: torch.Tensor, seq_length: int, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The rebuilt states [b, seq_length, h] of a condition [b, c, d]; padded positions are
        rebuilt like others.

        Args:
            padding_mask: bool [b, seq_length], True = a position without influence on the others.
        """
        hidden_keys = None
        if padding_mask is not None:
            hidden_keys = additive(padding_mask[:, None, None, :], condition.dtype)
        _check_length(seq_length, self.query.shape[0])
        queries = self.query[:seq_length, None].expand(-1, condition.shape[0], -1).contiguous()
        context = condition.transpose(0, 1).contiguous()
        states = self.decoder(
            queries, attention_mask=hidden_keys, context=context, context_mask=None
        )
        if self.positions is not None and self.encoder is not None:
            states = self.positions(states.transpose(0, 1)).transpose(0, 1).contiguous()
            states = self.encoder(states, attention_mask=hidden_keys)
        return self.output_projection(states.transpose(0, 1))


class LearnedPositions(nn.Module):
    """Adds row t + 2 of a learned table to position t."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The positions' embeddings added to x: [b, s, width] -> the same shape. Raises ValueError
        for s > rows - 2."""
        length = x.shape[1]
        _check_length(length, self.weight.shape[0] - POSITION_OFFSET)
        return x + self.weight[POSITION_OFFSET : POSITION_OFFSET + length]


class LinearM(nn.Module):
    """The M of `aligner.kind: none`: the first c positions, each through one linear map; zeros
    beyond the prompt's end."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        aligner = config.model.aligner
        self.num_queries = aligner.num_queries
        self.projection = nn.Linear(config.model.decoder.hidden_size, aligner.hidden_size)

    def forward(self, hidden: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        """The condition [b, c, d] of hidden states [b, s, h]; padding_mask is bool [b, s], True =
        padding."""
        first = self.projection(hidden[:, : self.num_queries])
        first = first.masked_fill(padding_mask[:, : self.num_queries, None], 0)
        return F.pad(first, (0, 0, 0, self.num_queries - first.shape[1]))


class LinearN(nn.Module):
    """The N of `aligner.kind: none`: each condition vector through one linear map; positions beyond
    c get its bias."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        aligner = config.model.aligner
        self.projection = nn.Linear(aligner.hidden_size, config.model.decoder.hidden_size)

    def forward(
        self, condition: torch.Tensor, seq_length: int, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Maps condition [b, c, d] to [b, seq_length, h]. The padding_mask is AlignerN's; here no
        position has influence on another, so it is not used."""
        missing = max(0, seq_length - condition.shape[1])
        return self.projection(F.pad(condition[:, :seq_length], (0, 0, 0, missing)))


def _encoder(config, process_groups: ProcessGroupCollection) -> TransformerBlock:
    spec = block_spec(config.num_layers, bidirectional_layer())
    return TransformerBlock(config, spec, pg_collection=process_groups)


def _decoder(config, process_groups: ProcessGroupCollection) -> TransformerBlock:
    spec = block_spec(config.num_layers, cross_attention_layer())
    return TransformerBlock(config, spec, pg_collection=process_groups)


def _check_length(length: int, longest: int) -> None:
    if length > longest:
        raise ConfigError(
            f"a prompt of {length} positions is longer than the {longest} that AlignerNet has; "
            "raise model.aligner.max_positions or shorten the prompt"
        )
