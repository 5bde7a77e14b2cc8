"""Layer specs: Megatron-Core's stock transformer layer with MAGNETO's norms, in three forms.

Two providers give the same parameters and checkpoint keys: `local` (Megatron's linears and
torch's attention) and `transformer_engine`. Of the second, all but its kernels is run in CI, with
megatron-core 0.16.1 and 0.19.2 (tests/transformer_engine); tests/gpu compares numbers on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_kosmosg.config.schema import LoraConfig
from megatron_kosmosg.models.core_attention import CoreAttention
from megatron_kosmosg.models.linears import ColumnParallelLinear, RowParallelLinear
from megatron_kosmosg.models.lora import adapted_column, adapted_row
from megatron_kosmosg.models.norms import LayerNorm, SubLN, SubLNRowParallelLinear
from megatron_kosmosg.parallel.core_versions import mlp_submodule
from megatron_kosmosg.parallel.platform import transformer_impl


@dataclass(frozen=True)
class Provider:
    """The classes that a layer is built of: linears, norms and attention."""

    column_parallel: type
    row_parallel: type
    sub_norm_row_parallel: type
    causal_attention: type
    masked_attention: type
    norm: type


_BIAS_DROPOUT_ADD = cast(type, get_bias_dropout_add)
"""A function, which Megatron's layer takes although its annotation has classes alone."""

LOCAL = Provider(
    column_parallel=ColumnParallelLinear,
    row_parallel=RowParallelLinear,
    sub_norm_row_parallel=SubLNRowParallelLinear,
    causal_attention=CoreAttention,
    masked_attention=CoreAttention,
    norm=LayerNorm,
)


def transformer_engine_provider() -> Provider:
    """TransformerEngine's linears and causal attention; ImportError without it."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TERowParallelLinear,
    )

    class TESubLNRowParallelLinear(SubLN, TERowParallelLinear):
        """TransformerEngine's row-parallel linear with MAGNETO's sub-norm."""

    return Provider(
        column_parallel=TEColumnParallelLinear,
        row_parallel=TERowParallelLinear,
        sub_norm_row_parallel=TESubLNRowParallelLinear,
        causal_attention=TEDotProductAttention,
        masked_attention=CoreAttention,
        norm=LayerNorm,
    )


def provider() -> Provider:
    """The provider for this process and torch's default device."""
    return LOCAL if transformer_impl() == "local" else transformer_engine_provider()


def block_spec(num_layers: int, layer: ModuleSpec) -> TransformerBlockSubmodules:
    """A stack of `num_layers` equal layers; its final LayerNorm is built where the stack ends."""
    # The annotation has a norm itself; what Megatron takes is its class.
    norm = cast(Any, provider().norm)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def causal_layer(lora: LoraConfig) -> ModuleSpec:
    """Layer of the language decoder, with adapters where they are asked for."""
    parts = provider()
    return _layer(AttnMaskType.causal, with_adapters(parts, lora) if lora.rank else parts)


def with_adapters(parts: Provider, lora: LoraConfig) -> Provider:
    """The same building blocks, except that the linears of self-attention and feed-forward have
    adapters. Where there is a sub-norm, the adapters read what it gives."""
    row = adapted_row(parts.row_parallel, lora)
    sub_norm_row = type(f"SubLN{row.__name__}", (SubLN, row), {})
    column = adapted_column(parts.column_parallel, lora)
    return replace(parts, column_parallel=column, sub_norm_row_parallel=sub_norm_row)


def bidirectional_layer() -> ModuleSpec:
    """Layer of AlignerNet's encoders; the attention mask hides padding."""
    return _layer(AttnMaskType.padding, provider())


def cross_attention_layer() -> ModuleSpec:
    """Layer of AlignerNet's decoders: bidirectional, with cross-attention that has no sub-norm."""
    return _layer(AttnMaskType.padding, provider(), with_cross_attention=True)


def cross_attention_spec() -> ModuleSpec:
    """Cross-attention without a sub-norm; the attention mask hides keys."""
    parts = provider()
    return ModuleSpec(
        module=CrossAttention,
        params={"attn_mask_type": AttnMaskType.padding},
        submodules=CrossAttentionSubmodules(
            linear_q=parts.column_parallel,
            linear_kv=parts.column_parallel,
            core_attention=parts.masked_attention,
            linear_proj=parts.row_parallel,
        ),
    )


def _layer(
    mask: AttnMaskType, parts: Provider, *, with_cross_attention: bool = False
) -> ModuleSpec:
    causal = mask is AttnMaskType.causal
    self_attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.column_parallel,
            core_attention=parts.causal_attention if causal else parts.masked_attention,
            linear_proj=parts.sub_norm_row_parallel,
        ),
    )
    feed_forward = mlp_submodule(
        MLPSubmodules(linear_fc1=parts.column_parallel, linear_fc2=parts.sub_norm_row_parallel)
    )
    cross = {}
    if with_cross_attention:
        cross = {
            "pre_cross_attn_layernorm": parts.norm,
            "cross_attention": cross_attention_spec(),
            "cross_attn_bda": _BIAS_DROPOUT_ADD,
        }
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=self_attention,
            self_attn_bda=_BIAS_DROPOUT_ADD,
            pre_mlp_layernorm=parts.norm,
            mlp=feed_forward,
            mlp_bda=_BIAS_DROPOUT_ADD,
            **cross,
        ),
    )
