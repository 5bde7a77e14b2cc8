"""Which weights the saves of a run leave out: those that are frozen and lie in another checkpoint.

A weight counts by its key, under which the layers of a stack are one: it is left out when no rank
trains any part of it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron_kosmosg.checkpoint.base_record import Base, checkpoint_fingerprint


def frozen_weights(
    models: dict[str, ShardedStateDict], base: Path, available: Collection[str]
) -> Base | None:
    """What saves take from the checkpoint in `base`; None for nothing. A collective.

    Args:
        models: the state of this rank's model (`weights.model_state`).
        available: keys of the weights that are those of `base`.
    """
    local: dict[str, str | None] = {}
    for entries in models.values():
        for entry in entries.values():
            parameter = entry.data
            is_frozen = isinstance(parameter, torch.nn.Parameter) and not parameter.requires_grad
            dtype = str(parameter.dtype).removeprefix("torch.") if is_frozen else None
            # Layers of a stack share a key: one that trains keeps all of them.
            local[entry.key] = dtype if local.get(entry.key, dtype) else None
    gathered: list[dict[str, str | None]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, local)
    trained = {key for part in gathered for key, dtype in part.items() if dtype is None}
    weights = {
        key: dtype
        for part in gathered
        for key, dtype in sorted(part.items())
        if dtype is not None and key in available and key not in trained
    }
    if not weights:
        return None
    # Rank 0 writes it down.
    mark = checkpoint_fingerprint(base) if dist.get_rank() == 0 else ""
    return Base(str(base.resolve()), mark, weights)


def without(models: dict[str, ShardedStateDict], base: Base) -> dict[str, ShardedStateDict]:
    """The entries that a save writes."""
    return {
        name: {key: entry for key, entry in entries.items() if entry.key not in base.weights}
        for name, entries in models.items()
    }
