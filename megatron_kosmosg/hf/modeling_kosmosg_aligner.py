"""AlignerNet's encoder M (paper section 2.2) in plain PyTorch, a component of a diffusers folder.

The file travels with every exported model, so it imports torch and diffusers only. Names inside a
layer are those of the language model's layers (`Kosmos2TextBlock`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

KINDS = ("full", "decoder_only", "none")
POSITION_OFFSET = 2
"""Position t reads row t + 2 of the position table, so the longest prompt is two rows less."""
LAYER_NORM_EPS = 1e-5


class KosmosGAligner(ModelMixin, ConfigMixin):
    """Language-model states of any length -> `num_queries` vectors that a U-Net reads.

    kind: `full`; `decoder_only` (no self-attention over the states); `none` (one linear map per
    position). Sizes: input_size is the language model's width, hidden_size the U-Net's
    cross-attention width; max_positions is the number of rows of the position table.
    """

    _no_split_modules = ["AlignerLayer"]
    _skip_layerwise_casting_patterns = ["positions", "norm"]

    @register_to_config
    def __init__(
        self,
        input_size: int = 2048,
        hidden_size: int = 768,
        ffn_hidden_size: int = 3072,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        num_queries: int = 77,
        max_positions: int = 32768,
        kind: str = "full",
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"an aligner of kind {kind!r}; known kinds are {', '.join(KINDS)}")
        if kind == "none":
            self.projection = nn.Linear(input_size, hidden_size)
            return
        sizes = (num_layers, hidden_size, ffn_hidden_size, num_attention_heads)
        self.input_projection = nn.Linear(input_size, hidden_size)
        self.positions = nn.Embedding(max_positions, hidden_size)
        self.encoder = AlignerStack(*sizes) if kind == "full" else None
        self.query = nn.Parameter(torch.randn(num_queries, hidden_size))
        self.decoder = AlignerStack(*sizes, cross_attention=True)

    @property
    def longest_prompt(self) -> int | None:
        """The most positions that `forward` takes; None: any number."""
        if self.config["kind"] == "none":
            return None
        return self.config["max_positions"] - POSITION_OFFSET

    def forward(self, hidden: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        """The condition [b, num_queries, d] of hidden states [b, s, input_size]; padding_mask is
        bool [b, s], True = padding.

        Padding has no influence on the result. Raises ValueError when s exceeds longest_prompt.
        """
        length, longest = hidden.shape[1], self.longest_prompt
        if longest is None:
            return self._map_each_position(hidden, padding_mask)
        if length > longest:
            raise ValueError(f"a prompt of {length} positions; this aligner has {longest}")
        # Through the module, not its weight: offloading and casting act when a module is called.
        rows = torch.arange(length, device=hidden.device) + POSITION_OFFSET
        states = self.input_projection(hidden) + self.positions(rows)
        states = states.masked_fill(padding_mask.unsqueeze(-1), 0)
        if self.encoder is not None:
            states = self.encoder(states, hidden_keys=padding_mask)
        queries = self.query.expand(hidden.shape[0], -1, -1)
        return self.decoder(queries, context=states, hidden_context=padding_mask)

    def _map_each_position(self, hidden: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        """The first positions through one linear map; zeros beyond the prompt's end."""
        count = self.config["num_queries"]
        first = self.projection(hidden[:, :count])
        first = first.masked_fill(padding_mask[:, :count, None], 0)
        return F.pad(first, (0, 0, 0, count - first.shape[1]))


class AlignerStack(nn.Module):
    """Bidirectional layers and a final LayerNorm; with cross_attention they also read a context."""

    def __init__(
        self,
        num_layers: int,
        width: int,
        ffn_width: int,
        num_heads: int,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            AlignerLayer(width, ffn_width, num_heads, cross_attention) for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(
        self,
        states: torch.Tensor,
        hidden_keys: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        hidden_context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """states [b, s, d], after all layers; they attend to themselves and, where given, to
        context [b, k, d]. The masks are bool [b, s] and [b, k], True = hidden."""
        for layer in self.layers:
            states = layer(states, hidden_keys, context, hidden_context)
        return self.layer_norm(states)


class AlignerLayer(nn.Module):
    """Self-attention, cross-attention if there is a context, feed-forward: each pre-normed, added.

    MAGNETO's second norm stands inside self-attention and feed-forward, not in cross-attention.
    """

    def __init__(self, width: int, ffn_width: int, num_heads: int, cross_attention: bool) -> None:
        super().__init__()
        self.self_attn = AlignerAttention(width, num_heads, inner_norm=True)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        if cross_attention:
            self.encoder_attn = AlignerAttention(width, num_heads, inner_norm=False)
            self.encoder_attn_layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.ffn = AlignerFeedForward(width, ffn_width)
        self.final_layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(
        self,
        states: torch.Tensor,
        hidden_keys: torch.Tensor | None,
        context: torch.Tensor | None,
        hidden_context: torch.Tensor | None,
    ) -> torch.Tensor:
        """One layer of an AlignerStack, with the arguments of AlignerStack.forward."""
        normed = self.self_attn_layer_norm(states)
        states = states + self.self_attn(normed, normed, hidden_keys)
        if context is not None:
            normed = self.encoder_attn_layer_norm(states)
            states = states + self.encoder_attn(normed, context, hidden_context)
        return states + self.ffn(self.final_layer_norm(states))


class AlignerAttention(nn.Module):
    """Multi-head attention with biases; inner_norm adds MAGNETO's LayerNorm before out_proj."""

    def __init__(self, width: int, num_heads: int, inner_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS) if inner_norm else None

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, hidden_keys: torch.Tensor | None
    ) -> torch.Tensor:
        """What queries [b, q, d] read from keys [b, k, d] -> [b, q, d]. hidden_keys: bool [b, k],
        True = hidden."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, x in (
                (self.q_proj, queries),
                (self.k_proj, keys),
                (self.v_proj, keys),
            )
        )
        visible = None if hidden_keys is None else ~hidden_keys[:, None, None, :]
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        joined = heads.transpose(1, 2).flatten(2)
        if self.inner_attn_ln is not None:
            joined = self.inner_attn_ln(joined)
        return self.out_proj(joined)


class AlignerFeedForward(nn.Module):
    """The feed-forward block: fc1, exact GELU in float32, LayerNorm, fc2."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ffn_width)
        self.fc2 = nn.Linear(ffn_width, width)
        self.ffn_layernorm = nn.LayerNorm(ffn_width, eps=LAYER_NORM_EPS)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Maps states [b, s, d] to the same shape."""
        inner = self.fc1(states)
        inner = F.gelu(inner.float()).to(inner.dtype)
        return self.fc2(self.ffn_layernorm(inner))
