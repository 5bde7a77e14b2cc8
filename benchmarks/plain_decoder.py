"""The language decoder in plain PyTorch, on copies of the Megatron model's weights: what a step of
the same arithmetic costs without Megatron-Core."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.models.positions import PADDING_INDEX, sinusoid_table


class PlainDecoder(nn.Module):
    """Next-token logits of text; one rank, no dropout, no images."""

    def __init__(self, model: KosmosG, num_layers: int, num_heads: int, seq_length: int) -> None:
        super().__init__()
        self._num_layers, self._num_heads = num_layers, num_heads
        names = {n for n, _ in model.named_parameters() if n.startswith(("embedding", "decoder"))}
        self.weights = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(parameter.detach().clone())
                for name, parameter in model.named_parameters()
                if name in names
            }
        )
        width = self._get("embedding.word_embeddings.weight").shape[1]
        table = sinusoid_table(seq_length + PADDING_INDEX + 1, width)
        self.register_buffer("positions", table[PADDING_INDEX + 1 :])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [b, s] -> logits [b, s, padded vocabulary]."""
        table = self._get("embedding.word_embeddings.weight")
        x = F.embedding(tokens, table) * math.sqrt(table.shape[1]) + self.positions
        for i in range(self._num_layers):
            layer = f"decoder.layers.{i}."
            x = x + self._attention(layer, self._norm(layer + "input_layernorm", x))
            x = x + self._feed_forward(layer, self._norm(layer + "pre_mlp_layernorm", x))
        return F.linear(self._norm("decoder.final_layernorm", x), table)

    def _attention(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        qkv = self._linear(layer + "self_attention.linear_qkv", x)
        q, k, v = qkv.unflatten(-1, (self._num_heads, 3, -1)).transpose(1, 2).unbind(3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self._sub_norm_linear(layer + "self_attention.linear_proj", mixed)

    def _feed_forward(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self._linear(layer + "mlp.linear_fc1", x))
        return self._sub_norm_linear(layer + "mlp.linear_fc2", x)

    def _sub_norm_linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._linear(name, self._norm(name + ".sub_norm", x))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._get(name + ".weight"), self._get(name + ".bias"))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self._get(name + ".weight")
        return F.layer_norm(x, weight.shape, weight, self._get(name + ".bias"), 1e-5)

    def _get(self, name: str) -> torch.Tensor:
        return self.weights[name.replace(".", "/")]
