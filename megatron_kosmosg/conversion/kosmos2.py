"""Our language side <-> stock `Kosmos2ForConditionalGeneration` of transformers: names and config.

The two are numerically the same model (sinusoidal positions, sub-LayerNorm, tied output head).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2TextConfig, Kosmos2VisionConfig

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.schema import ModelConfig, RunConfig
from megatron_kosmosg.conversion.magneto_layers import cross_attention_rules, stack_rules
from megatron_kosmosg.conversion.rules import Rule, RuleTable, first_rows, same, weight_and_bias
from megatron_kosmosg.conversion.stored_names import EMBEDDING, TOWER
from megatron_kosmosg.conversion.tensors import (
    Selected,
    TensorSource,
    as_external,
    check_complete,
)
from megatron_kosmosg.data.tokenizer import Tokenizer

NATIVE_PREFIXES = ("embedding.", "decoder.", "resampler.", "vision_encoder.")
"""Prefixes of our tensors that the language side holds."""
_EMBEDDING = "text_model.model.embed_tokens.weight"
HEAD = "text_model.lm_head.weight"
"""Tied to the embedding, hence not stored."""

_MAY_DROP = {
    "vision_model.model.embeddings.position_ids": "a count from 0, made by the code",
    "text_model.model.embed_positions.weights": "the sinusoid table, computed by the code",
}


def kosmos2_table(model: ModelConfig) -> RuleTable:
    """Every tensor of the language side; their vocabulary may have more rows than ours."""
    rules = [first_rows(EMBEDDING, _EMBEDDING, model.vocab_size, (HEAD,))]
    rules += stack_rules("decoder", "text_model.model", model.decoder.num_attention_heads)
    rules += [same("resampler.latent_query", "image_to_text_projection.latent_query")]
    rules += weight_and_bias(same, "resampler.dense", "image_to_text_projection.dense")
    rules += cross_attention_rules(
        "resampler.cross_attention",
        "image_to_text_projection.x_attn",
        model.resampler.num_attention_heads,
    )
    rules += _tower_rules(TOWER, "vision_model.model.")
    return RuleTable(rules, _MAY_DROP)


def _tower_rules(native: str, external: str) -> list[Rule]:
    """The rules for the image tower, which on both sides has Hugging Face's classes under another
    prefix."""
    single = ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    rules = [same(f"{native}embeddings.{name}", f"{external}embeddings.{name}") for name in single]
    attention = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    inside = [*attention, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    layers = [f"encoder.layers.{{i}}.{name}" for name in inside]
    for name in ("pre_layrnorm", "post_layernorm", *layers):
        rules += weight_and_bias(same, native + name, external + name)
    return rules


def kosmos2_weights(source: TensorSource, config: RunConfig) -> TensorSource:
    """A model of ours under the names of the stock class, checked to be all of it."""
    external = as_external(kosmos2_table(config.model), Selected(source, NATIVE_PREFIXES))
    with torch.device("meta"):
        expected = Kosmos2ForConditionalGeneration(kosmos2_config(config)).state_dict()
    del expected[HEAD]
    check_complete(external.names(), {name: tuple(t.shape) for name, t in expected.items()})
    return external


def kosmos2_config(config: RunConfig) -> Kosmos2Config:
    """The stock config of our sizes. Raises ConversionError for what stock Kosmos-2 cannot be."""
    model = config.model
    decoder, vision, resampler = model.decoder, model.vision, model.resampler
    if resampler.num_attention_heads != decoder.num_attention_heads:
        raise ConversionError(
            f"model.resampler.num_attention_heads={resampler.num_attention_heads}, but stock "
            "Kosmos-2 gives the resampler as many heads as the decoder, "
            f"{decoder.num_attention_heads}; such a model cannot be exported"
        )
    return Kosmos2Config(
        text_config={
            "vocab_size": model.vocab_size,
            "max_position_embeddings": config.data.seq_length,
            "embed_dim": decoder.hidden_size,
            "layers": decoder.num_layers,
            "ffn_dim": decoder.ffn_hidden_size,
            "attention_heads": decoder.num_attention_heads,
            "dropout": decoder.hidden_dropout,
            "attention_dropout": decoder.attention_dropout,
            "layer_norm_eps": decoder.layernorm_epsilon,
            "pad_token_id": Tokenizer.pad_id,
            "bos_token_id": Tokenizer.bos_id,
            "eos_token_id": Tokenizer.eos_id,
        },
        vision_config={
            "num_hidden_layers": vision.num_layers,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        latent_query_num=resampler.num_latent_queries,
        architectures=["Kosmos2ForConditionalGeneration"],
    )


def text_and_vision(stock: Kosmos2Config) -> tuple[Kosmos2TextConfig, Kosmos2VisionConfig]:
    """The two parts of a stock config. Its annotations say what it may be given; it makes these
    classes of that."""
    text, vision = stock.text_config, stock.vision_config
    return cast(Kosmos2TextConfig, text), cast(Kosmos2VisionConfig, vision)


def model_sizes(found: Kosmos2Config, folder: Path) -> dict[str, Any]:
    """The sizes under `model` that a stock config states, by dotted key.

    Raises ConversionError for settings that would make it another model than ours.
    """
    text, vision = text_and_vision(found)
    expected = {
        "text_config.activation_function": (text.activation_function, "gelu"),
        "text_config.scale_embedding": (text.scale_embedding, True),
        "text_config.add_cross_attention": (text.add_cross_attention, False),
        "text_config.pad_token_id": (text.pad_token_id, Tokenizer.pad_id),
        "vision_config.hidden_act": (vision.hidden_act, "quick_gelu"),
        "vision_config.layer_norm_eps": (vision.layer_norm_eps, 1e-5),
        "vision_config.num_channels": (vision.num_channels, 3),
    }
    for name, (value, needed) in expected.items():
        if value != needed:
            raise ConversionError(
                f"{folder}: config.json has {name}={value!r}, KOSMOS-G has {needed!r}; "
                "this is another model"
            )
    return {
        "model.vocab_size": text.vocab_size,
        "model.decoder.num_layers": text.layers,
        "model.decoder.hidden_size": text.embed_dim,
        "model.decoder.ffn_hidden_size": text.ffn_dim,
        "model.decoder.num_attention_heads": text.attention_heads,
        "model.decoder.layernorm_epsilon": text.layer_norm_eps,
        "model.vision.num_layers": vision.num_hidden_layers,
        "model.vision.hidden_size": vision.hidden_size,
        "model.vision.ffn_hidden_size": vision.intermediate_size,
        "model.vision.num_attention_heads": vision.num_attention_heads,
        "model.vision.image_size": vision.image_size,
        "model.vision.patch_size": vision.patch_size,
        "model.resampler.num_latent_queries": found.latent_query_num,
        "model.resampler.num_attention_heads": text.attention_heads,
    }
