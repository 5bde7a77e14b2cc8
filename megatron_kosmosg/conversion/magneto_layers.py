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
    ours: str, theirs: str, heads: int, has_cross_attention: bool = False
) -> list[Rule]:
    """Rules of all layers `ours.layers.{i}` = `theirs.layers.{i}` and the final LayerNorm.

    Args:
        heads: attention heads of the stack.
    """
    mine, other = f"{ours}.layers.{{i}}", f"{theirs}.layers.{{i}}"
    rules = weight_and_bias(same, f"{ours}.final_layernorm", f"{theirs}.layer_norm")
    for name, their_name in _SAME.items():
        rules += weight_and_bias(same, f"{mine}.{name}", f"{other}.{their_name}")
    projections = [f"{other}.self_attn.{part}_proj" for part in "qkv"]
    rules += weight_and_bias(interleaved, f"{mine}.self_attention.linear_qkv", projections, heads)
    if has_cross_attention:
        rules += weight_and_bias(
            same, f"{mine}.pre_cross_attn_layernorm", f"{other}.encoder_attn_layer_norm"
        )
        rules += cross_attention_rules(f"{mine}.cross_attention", f"{other}.encoder_attn", heads)
    return rules


def cross_attention_rules(ours: str, theirs: str, heads: int) -> list[Rule]:
    """Attention whose keys and values come from elsewhere: q alone, k and v fused on our side."""
    return [
        *weight_and_bias(same, f"{ours}.linear_q", f"{theirs}.q_proj"),
        *weight_and_bias(
            interleaved, f"{ours}.linear_kv", [f"{theirs}.k_proj", f"{theirs}.v_proj"], heads
        ),
        *weight_and_bias(same, f"{ours}.linear_proj", f"{theirs}.out_proj"),
    ]
