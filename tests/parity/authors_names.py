"""The authors' parameter names for ours, for the comparison with their numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

_PREFIXES = {
    "embedding.word_embeddings.": "gpt_model.decoder.embed_tokens.",
    "decoder.": "gpt_model.decoder.",
    "resampler.cross_attention.": "img_connector.x_attn.",
    "resampler.": "img_connector.",
    "aligner_m.input_projection.": "aligner.encoder_proj.embed_tokens.",
    "aligner_m.positions.": "aligner.encoder_proj.embed_positions.",
    "aligner_m.encoder.": "aligner.encoder_proj.",
    "aligner_m.query": "aligner.encoder_query",
    "aligner_m.decoder.": "aligner.encoder.",
    "aligner_n.query": "aligner.decoder_query",
    "aligner_n.decoder.": "aligner.decoder.",
    "aligner_n.positions.": "aligner.decoder_proj.embed_positions.",
    "aligner_n.encoder.": "aligner.decoder_proj.",
    "aligner_n.output_projection.": "aligner.decoder_proj.output_projection.",
}
_LAYER = {
    "input_layernorm": "self_attn_layer_norm",
    "self_attention.linear_proj.sub_norm": "self_attn.inner_attn_ln",
    "self_attention.linear_proj": "self_attn.out_proj",
    "self_attention.linear_qkv": "self_attn.QKV_proj",
    "pre_cross_attn_layernorm": "encoder_attn_layer_norm",
    "cross_attention.linear_proj": "encoder_attn.out_proj",
    "cross_attention.linear_q": "encoder_attn.q_proj",
    "cross_attention.linear_kv": "encoder_attn.KV_proj",
    "pre_mlp_layernorm": "final_layer_norm",
    "mlp.linear_fc1": "ffn.fc1",
    "mlp.linear_fc2.sub_norm": "ffn.ffn_layernorm",
    "mlp.linear_fc2": "ffn.fc2",
    "final_layernorm": "layer_norm",
    "linear_proj": "out_proj",
    "linear_q": "q_proj",
    "linear_kv": "KV_proj",
}
_VISION = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.": "ts_attn.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}


def from_authors(
    name: str, shape: torch.Size, theirs: Mapping[str, torch.Tensor], heads: int
) -> tuple[torch.Tensor, list[str]]:
    """Our parameter (or its gradient) made of the authors' tensors, and their names.

    heads: attention heads of the stack that the parameter belongs to; shape: ours, with padding.
    """
    their_name = _translate(name)
    parts = re.search(r"\.(Q?KV)_proj\.", their_name)
    if parts is None:
        value = theirs[their_name]
        if value.shape[0] != shape[0]:  # vocabulary padding
            value = torch.cat([value, value.new_zeros(shape[0] - value.shape[0], *shape[1:])])
        return value, [their_name]
    names = [their_name.replace(parts.group(1) + "_proj", f"{p.lower()}_proj") for p in parts[1]]
    split = [theirs[n].unflatten(0, (heads, -1)) for n in names]
    return torch.stack(split, dim=1).flatten(0, 2), names


def _translate(name: str) -> str:
    if name.startswith("vision_encoder.tower."):
        name = name.removeprefix("vision_encoder.tower.")
        for ours, theirs in _VISION.items():
            name = name.replace(ours, theirs)
        return "img_model.visual." + name
    prefix = next(p for p in sorted(_PREFIXES, key=len, reverse=True) if name.startswith(p))
    rest = name[len(prefix) :]
    layer = re.match(r"(layers\.\d+\.)?(.*?)(\.?(?:weight|bias))?$", rest)
    body = _LAYER.get(layer.group(2), layer.group(2))
    return _PREFIXES[prefix] + (layer.group(1) or "") + body + (layer.group(3) or "")
