"""A model's config from its tensors: sizes from shapes, head counts from what else is known.

The number of attention heads leaves no trace in a weight's shape, and a wrong one gives a model
that runs and says nonsense; so it is never guessed except for the released sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.load import configured_keys, flatten, load_config
from megatron_kosmosg.config.schema import ModelConfig
from megatron_kosmosg.conversion.rules import RuleTable, split_layer
from megatron_kosmosg.conversion.stored_names import EMBEDDING, TOWER
from megatron_kosmosg.conversion.tensors import TensorSource
from megatron_kosmosg.stages import stage_facts

_PATCH = TOWER + "embeddings.patch_embedding.weight"
_POSITIONS = TOWER + "embeddings.position_embedding.weight"
_DIMENSIONS = {
    "model.vocab_size": (EMBEDDING, 0),
    "model.decoder.hidden_size": (EMBEDDING, 1),
    "model.decoder.ffn_hidden_size": ("decoder.layers.0.mlp.linear_fc1.weight", 0),
    "model.vision.hidden_size": (_PATCH, 0),
    "model.vision.patch_size": (_PATCH, 2),
    "model.vision.ffn_hidden_size": (TOWER + "encoder.layers.0.mlp.fc1.weight", 0),
    "model.resampler.num_latent_queries": ("resampler.latent_query", 0),
    "model.aligner.num_queries": ("aligner_m.query", 0),
    "model.aligner.hidden_size": ("aligner_m.query", 1),
    "model.aligner.ffn_hidden_size": ("aligner_m.encoder.layers.0.mlp.linear_fc1.weight", 0),
    "model.aligner.max_positions": ("aligner_m.positions.weight", 0),
}
"""{setting: (our tensor, dimension)}"""
_LAYERS = {
    "model.decoder.num_layers": "decoder.layers.{i}.mlp.linear_fc1.weight",
    "model.vision.num_layers": TOWER + "encoder.layers.{i}.mlp.fc1.weight",
    "model.aligner.num_layers": "aligner_m.encoder.layers.{i}.mlp.linear_fc1.weight",
}

Shapes = Mapping[str, tuple[int, ...]]


def native_shapes(table: RuleTable, external: TensorSource) -> dict[str, tuple[int, ...]]:
    """The shapes, by native names, of the tensors that are one tensor in both formats."""
    found = {}
    for name, info in external.names().items():
        if table.has_rule_for(name):
            native, _ = table.external_recipe(name)
            if len(native) == 1:
                found[native[0]] = info.shape
    return found


def sizes(shapes: Shapes, stage: str) -> dict[str, int]:
    """The sizes that the tensors show, as {dotted setting: number}.

    Raises ConversionError for a tensor that is missing or has too few dimensions.
    """
    has_aligner = bool(stage_facts(stage).aligner_parts)
    found = {
        key: _dimension(shapes, name, dimension)
        for key, (name, dimension) in _DIMENSIONS.items()
        if has_aligner or not key.startswith("model.aligner.")
    }
    for key, pattern in _LAYERS.items():
        numbers = [int(layer) for name in shapes for layer in _layer_of(name, pattern)]
        if numbers:
            found[key] = max(numbers) + 1
    patches = _dimension(shapes, _POSITIONS, 0) - 1
    found["model.vision.image_size"] = math.isqrt(patches) * found["model.vision.patch_size"]
    return found


def head_counts(
    found: Mapping[str, int], stage: str, decoder_heads: int | None, configured: set[str]
) -> dict[str, int]:
    """The numbers of heads beyond those `configured` (their dotted keys), by dotted setting.

    Args:
        decoder_heads: what the file itself says.

    Raises ConversionError when nothing says it.
    """
    released = ModelConfig()
    counts: dict[str, int] = {}
    if decoder_heads is not None:
        counts["model.decoder.num_attention_heads"] = decoder_heads
    stacks = {"decoder": released.decoder, "vision": released.vision}
    if stage_facts(stage).aligner_parts:
        stacks["aligner"] = released.aligner
    for stack, usual in stacks.items():
        key, width = f"model.{stack}.num_attention_heads", f"model.{stack}.hidden_size"
        if key in counts or key in configured:
            continue
        if found[width] != usual.hidden_size:
            raise ConversionError(
                f"the number of attention heads of {width}={found[width]} cannot be read from the "
                f"weights; add {key}=N (the number that the model was trained with)"
            )
        counts[key] = usual.num_attention_heads
    return counts


def refuse_contradictions(
    config_file: Path | None, overrides: list[str], found: Mapping[str, Any]
) -> None:
    """Raises ConversionError when the config file or an override contradicts what was found."""
    configured = configured_keys(config_file, overrides)
    needed = [f"{key}={found[key]}" for key in found if key not in configured]
    stated = flatten(load_config(config_file, [*needed, "logging.output_dir=unused", *overrides]))
    wrong = [
        f"{key} is {value} in the file, {stated[key]} in the config"
        for key, value in found.items()
        if stated[key] != value
    ]
    if wrong:
        raise ConversionError(
            "the config is not that of this file:\n  " + "\n  ".join(wrong) + "\nleave these "
            "settings out, or import the file that belongs to the config"
        )


def _dimension(shapes: Shapes, name: str, dimension: int) -> int:
    if name not in shapes or len(shapes[name]) <= dimension:
        part = name.split(".")[0]
        raise ConversionError(
            f"the tensors hold no {part} ({name} in our names), so its sizes are unknown"
        )
    return shapes[name][dimension]


def _layer_of(name: str, pattern: str) -> list[str]:
    found, layer = split_layer(name)
    return [layer] if found == pattern and layer is not None else []
