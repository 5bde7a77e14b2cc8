"""Names of a model's tensors <-> keys of Megatron-Core's checkpoints, where layers are stacked."""

from __future__ import annotations

import re

EMBEDDING = "embedding.word_embeddings.weight"
"""Its rows are padded in the checkpoint."""
TOWER = "vision_encoder.tower."
"""Prefix of the image tower's tensors."""

_STACK = r"(decoder|aligner_[mn]\.(?:encoder|decoder))\.layers\."
_LAYER_NAME = re.compile(_STACK + r"(\d+)\.(.+)")
_STACKED_KEY = re.compile(_STACK + r"(\D.*)")


def stored_key(name: str) -> tuple[str, int | None]:
    """(key, index along its first dimension) of a tensor in a checkpoint; the index is None where
    the tensor has a key of its own.

    The image tower is not Megatron's, hence not stacked.
    """
    found = _LAYER_NAME.fullmatch(name)
    if found is None:
        return name, None
    stack, layer, rest = found.groups()
    return f"{stack}.layers.{rest}", int(layer)


def names_under(key: str, first_dimension: int) -> list[str] | None:
    """Tensors stacked under `key`, in order; None when the key is a tensor's own name."""
    found = _STACKED_KEY.fullmatch(key)
    if found is None:
        return None
    stack, rest = found.groups()
    return [f"{stack}.layers.{layer}.{rest}" for layer in range(first_dimension)]
