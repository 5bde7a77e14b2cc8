"""The authors' fairseq names <-> ours: the only list of them.

Name trap: their `encoder_proj`, `encoder_query`, `encoder` are the paper's M, and their
`decoder_query`, `decoder`, `decoder_proj` its N.
"""

from __future__ import annotations

from collections.abc import Collection

from megatron_kosmosg.config.schema import ModelConfig
from megatron_kosmosg.conversion.magneto_layers import cross_attention_rules, stack_rules
from megatron_kosmosg.conversion.openai_clip import tower_rules
from megatron_kosmosg.conversion.rules import RuleTable, first_rows, same, weight_and_bias
from megatron_kosmosg.conversion.stored_names import EMBEDDING

_TOWER = "img_model.visual."
_DECODER = "gpt_model.decoder"
_SEPARATE_ATTENTION, _FUSED_ATTENTION = ".ts_attn.", ".attn.in_proj_"
_MAY_DROP = {
    f"{_DECODER}.embed_positions._float_tensor": "a buffer that only carries a dtype",
    f"{_DECODER}.self_attn_sope.scale": "a buffer of rotary positions, which are never applied",
    "aligner.clip_encoder.*": "the frozen text encoder, which model.clip_text.path gives",
    "diffusion_unet.*": "the frozen U-Net, which model.diffusion.path gives",
    "vae.*": "the frozen autoencoder, which model.diffusion.path gives",
}
_UNUSED_ATTENTION = {
    f"{_TOWER}transformer.resblocks.*.attn.*": "CLIP's own attention, replaced by ts_attn"
}


def authors_table(model: ModelConfig, *, fused_vision: bool = False) -> RuleTable:
    """The table for a model of these sizes, of which vocabulary and head counts matter.

    Args:
        fused_vision: the image tower has OpenAI's fused attention and no `ts_attn`.
    """
    heads, aligner_heads = model.decoder.num_attention_heads, model.aligner.num_attention_heads
    rules = [
        first_rows(
            EMBEDDING,
            f"{_DECODER}.embed_tokens.weight",
            model.vocab_size,
            duplicates=[f"{_DECODER}.output_projection.weight"],
        ),
        *stack_rules("decoder", _DECODER, heads),
        *tower_rules(_TOWER, fused_attention=fused_vision),
        same("resampler.latent_query", "img_connector.latent_query"),
        *weight_and_bias(same, "resampler.dense", "img_connector.dense"),
        *cross_attention_rules(
            "resampler.cross_attention",
            "img_connector.x_attn",
            model.resampler.num_attention_heads,
        ),
        same("aligner_m.query", "aligner.encoder_query"),
        same("aligner_m.positions.weight", "aligner.encoder_proj.embed_positions.weight"),
        same("aligner_n.query", "aligner.decoder_query"),
        same("aligner_n.positions.weight", "aligner.decoder_proj.embed_positions.weight"),
    ]
    linears = {
        "aligner_m.input_projection": "aligner.encoder_proj.embed_tokens",
        "aligner_n.output_projection": "aligner.decoder_proj.output_projection",
    }
    for native, external in linears.items():
        rules += weight_and_bias(same, native, external)
    stacks = {
        "aligner_m.encoder": "aligner.encoder_proj",
        "aligner_m.decoder": "aligner.encoder",
        "aligner_n.decoder": "aligner.decoder",
        "aligner_n.encoder": "aligner.decoder_proj",
    }
    for native, external in stacks.items():
        rules += stack_rules(native, external, aligner_heads, native.endswith("decoder"))
    return RuleTable(rules, _MAY_DROP if fused_vision else _MAY_DROP | _UNUSED_ATTENTION)


def has_fused_vision(names: Collection[str]) -> bool:
    """Whether the tower among these tensor names has only OpenAI's fused attention."""
    tower = [name for name in names if name.startswith(_TOWER)]
    fused = any(_FUSED_ATTENTION in name for name in tower)
    return fused and not any(_SEPARATE_ATTENTION in name for name in tower)


def stage_of(names: Collection[str]) -> str:
    """The stage (pretrain, align or instruct) whose parts of AlignerNet these tensor names hold."""
    if any(name.startswith("aligner.decoder") for name in names):
        return "align"
    return "instruct" if any(name.startswith("aligner.encoder") for name in names) else "pretrain"
