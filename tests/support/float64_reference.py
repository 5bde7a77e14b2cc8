"""The whole model in float64 without our code: stock Kosmos2, and AlignerNet in plain PyTorch.

Parameters go by the authors' names. The language model, image tower and resampler are those of
transformers' Kosmos2; AlignerNet is written out here from the paper and the released code (masks
hide padding from M alone; positions are learned and start at row 2; cross-attention has no
sub-norm).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import Kosmos2Config, Kosmos2Model

UNUSED = {  # buffers without influence, and the tied copy of the embedding
    "gpt_model.decoder.embed_positions._float_tensor",
    "gpt_model.decoder.self_attn_sope.scale",
    "gpt_model.decoder.output_projection.weight",
}
_STOCK = {
    "gpt_model.decoder.": "text_model.model.",
    "img_connector.": "image_to_text_projection.",
    "img_model.visual.": "vision_model.model.",
    "transformer.resblocks.": "encoder.layers.",
    "conv1.": "embeddings.patch_embedding.",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
    ".ts_attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
}


class Reference:
    """Outputs for weights and sizes of a golden file.

    `parameters`: float64 leaves by the authors' names, to be differentiated.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
        self.parameters = {
            name: value.double().requires_grad_()
            for name, value in weights.items()
            if name not in UNUSED
        }
        self._sizes = sizes
        rows = len(weights["gpt_model.decoder.embed_tokens.weight"])
        with _float64():
            self._stock = Kosmos2Model(_stock_config(sizes, rows)).eval()
        names = {name: _stock_name(name) for name in self.parameters if "aligner" not in name}
        assert set(names.values()) == {name for name, _ in self._stock.named_parameters()}
        self._stock_parameters = {names[name]: self.parameters[name] for name in names}

    def hidden(
        self, tokens: torch.Tensor, slots: torch.Tensor, images: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """([b, s, h] after the final norm, image features [n, q, h]).

        slots: bool [b, s], True = image slot; images: [n, 3, H, W], None for text alone.
        """
        inputs = {"input_ids": tokens, "image_embeds_position_mask": slots, "use_cache": False}
        if images is None:
            inputs["image_embeds"] = torch.empty(0, self._sizes["latents"], self._sizes["hidden"])
        else:
            inputs["pixel_values"] = images.double()
        with _float64():
            output = functional_call(self._stock, self._stock_parameters, kwargs=inputs)
        return output.last_hidden_state, output.image_embeds

    def condition(self, hidden: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """AlignerNet M: hidden [b, s, h], padding bool [b, s] (True = padding) -> [b, c, d]."""
        states = self._linear("encoder_proj.embed_tokens", hidden)
        states = self._with_positions("encoder_proj", states) * ~padding[..., None]
        states = self._stack("encoder_proj", states, padding, None, None)
        queries = self._weight("encoder_query").expand(len(hidden), -1, -1)
        return self._stack("encoder", queries, None, states, padding)

    def reconstruction(self, condition: torch.Tensor, length: int) -> torch.Tensor:
        """AlignerNet N: [b, c, d] -> [b, length, h]."""
        queries = self._weight("decoder_query")[:length].expand(len(condition), -1, -1)
        states = self._stack("decoder", queries, None, condition, None)
        states = self._with_positions("decoder_proj", states)
        states = self._stack("decoder_proj", states, None, None, None)
        return self._linear("decoder_proj.output_projection", states)

    def _stack(self, stack, x, padding, context, context_padding) -> torch.Tensor:
        for i in range(self._sizes["al_layers"]):
            layer = f"{stack}.layers.{i}"
            y = self._norm(f"{layer}.self_attn_layer_norm", x)
            x = x + self._attention(f"{layer}.self_attn", y, y, padding)
            if context is not None:
                y = self._norm(f"{layer}.encoder_attn_layer_norm", x)
                x = x + self._attention(f"{layer}.encoder_attn", y, context, context_padding)
            y = self._linear(f"{layer}.ffn.fc1", self._norm(f"{layer}.final_layer_norm", x))
            y = self._norm(f"{layer}.ffn.ffn_layernorm", F.gelu(y))
            x = x + self._linear(f"{layer}.ffn.fc2", y)
        return self._norm(f"{stack}.layer_norm", x)

    def _attention(self, name, x, keys, padding) -> torch.Tensor:
        heads = self._sizes["al_heads"]
        q, k, v = (
            self._linear(f"{name}.{part}_proj", source).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, source in (("q", x), ("k", keys), ("v", keys))
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], float("-inf"))
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        if f"aligner.{name}.inner_attn_ln.weight" in self.parameters:
            mixed = self._norm(f"{name}.inner_attn_ln", mixed)
        return self._linear(f"{name}.out_proj", mixed)

    def _with_positions(self, stack: str, x: torch.Tensor) -> torch.Tensor:
        return x + self._weight(f"{stack}.embed_positions.weight")[2 : 2 + x.shape[1]]

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias"))

    def _weight(self, name: str) -> torch.Tensor:
        return self.parameters[f"aligner.{name}"]


@contextmanager
def _float64() -> Iterator[None]:
    """Stock Kosmos2 makes its causal mask in torch's default dtype, whatever the model's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _stock_config(sizes: Mapping[str, int], rows: int) -> Kosmos2Config:
    return Kosmos2Config(
        text_config={
            "vocab_size": rows,
            "embed_dim": sizes["hidden"],
            "layers": sizes["layers"],
            "ffn_dim": sizes["ffn"],
            "attention_heads": sizes["heads"],
        },
        vision_config={
            "hidden_size": sizes["vis_width"],
            "intermediate_size": 4 * sizes["vis_width"],
            "num_hidden_layers": sizes["vis_layers"],
            "num_attention_heads": sizes["vis_heads"],
            "image_size": sizes["image"],
            "patch_size": sizes["patch"],
        },
        latent_query_num=sizes["latents"],
        attn_implementation="eager",
    )


def _stock_name(name: str) -> str:
    for theirs, stock in _STOCK.items():
        name = name.replace(theirs, stock)
    return name
