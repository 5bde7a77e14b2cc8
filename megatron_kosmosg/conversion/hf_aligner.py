"""AlignerNet M <-> the `aligner/` component of the diffusers folder: names and config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_kosmosg.config.schema import AlignerConfig, ModelConfig
from megatron_kosmosg.conversion.magneto_layers import stack_rules
from megatron_kosmosg.conversion.rules import RuleTable, same, weight_and_bias
from megatron_kosmosg.conversion.tensors import (
    Selected,
    TensorSource,
    as_theirs,
    check_complete,
)
from megatron_kosmosg.inference.modeling_kosmosg_aligner import KosmosGAligner

OURS = ("aligner_m.",)
"""Prefix of our tensors that the component holds."""
NOT_EXPORTED = ("aligner_n.",)
"""N only serves the reconstruction loss of `align`."""


def aligner_table(aligner: AlignerConfig) -> RuleTable:
    """Every tensor of M in its `kind`; the component keeps our names outside the layers."""
    if aligner.kind == "none":
        return RuleTable(weight_and_bias(same, "aligner_m.projection", "projection"))
    rules = weight_and_bias(same, "aligner_m.input_projection", "input_projection")
    for name in ("positions.weight", "query"):
        rules.append(same(f"aligner_m.{name}", name))
    heads = aligner.num_attention_heads
    if aligner.kind == "full":
        rules += stack_rules("aligner_m.encoder", "encoder", heads)
    rules += stack_rules("aligner_m.decoder", "decoder", heads, has_cross_attention=True)
    return RuleTable(rules)


def aligner_weights(source: TensorSource, model: ModelConfig) -> TensorSource:
    """M of a model of ours under the component's names, checked to be all of it."""
    theirs = as_theirs(aligner_table(model.aligner), Selected(source, OURS))
    with torch.device("meta"):
        wanted = KosmosGAligner(**aligner_arguments(model)).state_dict()
    check_complete(theirs.names(), {name: tuple(t.shape) for name, t in wanted.items()})
    return theirs


def aligner_arguments(model: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of `KosmosGAligner`, which are its config.json too."""
    aligner = model.aligner
    return {
        "input_size": model.decoder.hidden_size,
        "hidden_size": aligner.hidden_size,
        "ffn_hidden_size": aligner.ffn_hidden_size,
        "num_layers": aligner.num_layers,
        "num_attention_heads": aligner.num_attention_heads,
        "num_queries": aligner.num_queries,
        "max_positions": aligner.max_positions,
        "kind": aligner.kind,
    }


def aligner_sizes(settings: Mapping[str, Any]) -> AlignerConfig:
    """The sizes under `model.aligner` that the component's config.json states."""
    return AlignerConfig(
        kind=settings["kind"],
        num_layers=settings["num_layers"],
        hidden_size=settings["hidden_size"],
        ffn_hidden_size=settings["ffn_hidden_size"],
        num_attention_heads=settings["num_attention_heads"],
        num_queries=settings["num_queries"],
        max_positions=settings["max_positions"],
    )
