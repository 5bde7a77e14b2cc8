"""AlignerNet M <-> the `aligner/` component of the diffusers folder: names and config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.load import flatten
from megatron_kosmosg.config.schema import AlignerConfig, RunConfig
from megatron_kosmosg.conversion.exported_folder import read_model_json
from megatron_kosmosg.conversion.magneto_layers import stack_rules
from megatron_kosmosg.conversion.rules import RuleTable, same, weight_and_bias
from megatron_kosmosg.conversion.tensors import (
    Selected,
    TensorSource,
    as_external,
    check_complete,
)
from megatron_kosmosg.hf.modeling_kosmosg_aligner import KosmosGAligner

NATIVE_PREFIXES = ("aligner_m.",)
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


def aligner_weights(source: TensorSource, config: RunConfig) -> TensorSource:
    """M of a model of ours under the component's names, checked to be all of it."""
    external = as_external(aligner_table(config.model.aligner), Selected(source, NATIVE_PREFIXES))
    with torch.device("meta"):
        expected = KosmosGAligner(**aligner_arguments(config)).state_dict()
    check_complete(external.names(), {name: tuple(t.shape) for name, t in expected.items()})
    return external


_KEYS = {
    "input_size": "model.decoder.hidden_size",
    "hidden_size": "model.aligner.hidden_size",
    "ffn_hidden_size": "model.aligner.ffn_hidden_size",
    "num_layers": "model.aligner.num_layers",
    "num_attention_heads": "model.aligner.num_attention_heads",
    "num_queries": "model.aligner.num_queries",
    "max_positions": "model.aligner.max_positions",
    "kind": "model.aligner.kind",
}
"""Names in the component's config.json, and ours."""


def aligner_arguments(config: RunConfig) -> dict[str, Any]:
    """Keyword arguments of `KosmosGAligner`, which are its config.json too."""
    native = flatten(config)
    return {name: native[key] for name, key in _KEYS.items()}


def aligner_sizes(folder: Path) -> dict[str, Any]:
    """The sizes that the component's config.json states, by dotted key.

    Raises ConversionError for a config.json that is not there or lacks one.
    """
    settings = read_model_json(folder / "config.json")
    missing = [name for name in _KEYS if name not in settings]
    if missing:
        raise ConversionError(f"{folder}: config.json has no {', '.join(missing)}")
    return {key: settings[name] for name, key in _KEYS.items()}
