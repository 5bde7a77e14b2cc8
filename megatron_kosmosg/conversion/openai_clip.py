"""OpenAI's CLIP image tower under its own names (`ViT-L-14-sd.pt`, and inside the authors' files).

Our tower is Hugging Face's `CLIPVisionModel`, whose projections are separate.
"""

from __future__ import annotations

from pathlib import Path

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion.fairseq_file import LazyTensors
from megatron_kosmosg.conversion.rules import Rule, RuleTable, same, stacked, weight_and_bias
from megatron_kosmosg.conversion.stored_names import TOWER
from megatron_kosmosg.conversion.torch_file import LazyTensor, load_lazily

_BLOCK = "transformer.resblocks.{i}."
_MODULES = {
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers.{i}.layer_norm1": _BLOCK + "ln_1",
    "encoder.layers.{i}.layer_norm2": _BLOCK + "ln_2",
    "encoder.layers.{i}.mlp.fc1": _BLOCK + "mlp.c_fc",
    "encoder.layers.{i}.mlp.fc2": _BLOCK + "mlp.c_proj",
}
_TENSORS = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
}
_TEXT_TOWER = (
    "transformer.*",
    "token_embedding.weight",
    "positional_embedding",
    "ln_final.*",
    "text_projection",
    "logit_scale",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
)
_NO_TEXT_TOWER = "CLIP's text tower: KOSMOS-G reads text itself"


def tower_rules(prefix: str, *, fused_attention: bool) -> list[Rule]:
    """Rules of the tower under `prefix`.

    Args:
        fused_attention: q, k and v in one `attn.in_proj_*` (OpenAI), else `ts_attn` with separate
            ones (the authors).
    """
    rules = [same(TOWER + native, prefix + external) for native, external in _TENSORS.items()]
    for native, external in _MODULES.items():
        rules += weight_and_bias(same, TOWER + native, prefix + external)
    attention, block = f"{TOWER}encoder.layers.{{i}}.self_attn.", prefix + _BLOCK
    if not fused_attention:
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            rules += weight_and_bias(same, attention + part, f"{block}ts_attn.{part}")
        return rules
    for end in ("weight", "bias"):
        separate = [f"{attention}{part}_proj.{end}" for part in "qkv"]
        rules.append(stacked(separate, f"{block}attn.in_proj_{end}"))
    return rules + weight_and_bias(same, attention + "out_proj", f"{block}attn.out_proj")


def clip_table() -> RuleTable:
    """Ours <-> OpenAI's CLIP, of which only the image tower is used."""
    return RuleTable(
        tower_rules("visual.", fused_attention=True),
        {
            "visual.proj": "CLIP's projection to the shared space: the decoder reads the states",
            **dict.fromkeys(_TEXT_TOWER, _NO_TEXT_TOWER),
        },
    )


def read_clip_file(path: Path, *, trust: bool = False) -> LazyTensors:
    """The tensors of a CLIP state dict: bare, under `state_dict`, or with the prefix `module.`.

    Entries that are no tensors are left out. Raises ConversionError for a file without a tower.
    """
    content = load_lazily(path, trust=trust)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a state dict")
    tensors = {
        str(name).removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, LazyTensor)
    }
    if not any(name.startswith("visual.") for name in tensors):
        raise ConversionError(
            f"{path} has no tensor under 'visual.'; --vision takes a CLIP state dict such as "
            "ViT-L-14-sd.pt"
        )
    return LazyTensors(tensors)
