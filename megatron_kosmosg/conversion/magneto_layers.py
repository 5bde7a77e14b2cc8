"""Names of a MAGNETO layer in Megatron-Core and in everybody else's code.

The authors' torchscale, Hugging Face's Kosmos-2 and our aligner component agree on the names inside
a layer (`final_layer_norm` stands before the feed-forward part), so one list serves all tables.
"""

from __future__ import annotations

from megatron_kosmosg.conversion.rules import Rule, interleaved, same, weight_and_bias

_SAME = {
    "input_layernorm": "self_attn_layer_norm",
    "self_attention.linear_proj.sub_norm": "self_attn.inner_attn_ln",
    "self_attention.linear_proj": "self_attn.out_proj",
    "pre_mlp_layernorm": "final_layer_norm",
    "mlp.linear_fc1": "ffn.fc1",
    "mlp.linear_fc2.sub_norm": "ffn.ffn_layernorm",
    "mlp.linear_fc2": "ffn.fc2",
}


def stack_rules(
    native: str, external: str, heads: int, has_cross_attention: bool = False
) -> list[Rule]:
    """Rules of all layers `native.layers.{i}` = `external.layers.{i}` and the final LayerNorm.

    Args:
        heads: attention heads of the stack.
    """
    native_layer, external_layer = f"{native}.layers.{{i}}", f"{external}.layers.{{i}}"
    rules = weight_and_bias(same, f"{native}.final_layernorm", f"{external}.layer_norm")
    for name, external_name in _SAME.items():
        rules += weight_and_bias(
            same, f"{native_layer}.{name}", f"{external_layer}.{external_name}"
        )
    projections = [f"{external_layer}.self_attn.{part}_proj" for part in "qkv"]
    rules += weight_and_bias(
        interleaved, f"{native_layer}.self_attention.linear_qkv", projections, heads
    )
    if has_cross_attention:
        rules += weight_and_bias(
            same,
            f"{native_layer}.pre_cross_attn_layernorm",
            f"{external_layer}.encoder_attn_layer_norm",
        )
        rules += cross_attention_rules(
            f"{native_layer}.cross_attention", f"{external_layer}.encoder_attn", heads
        )
    return rules


def cross_attention_rules(native: str, external: str, heads: int) -> list[Rule]:
    """Attention whose keys and values come from elsewhere: q alone, k and v fused on the native
    side."""
    return [
        *weight_and_bias(same, f"{native}.linear_q", f"{external}.q_proj"),
        *weight_and_bias(
            interleaved, f"{native}.linear_kv", [f"{external}.k_proj", f"{external}.v_proj"], heads
        ),
        *weight_and_bias(same, f"{native}.linear_proj", f"{external}.out_proj"),
    ]
