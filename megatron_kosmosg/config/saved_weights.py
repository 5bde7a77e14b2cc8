"""Which weights the checkpoints of a run hold: all, or those that training changes."""

from __future__ import annotations

from megatron_kosmosg.config.schema import RunConfig


def saves_trained_alone(config: RunConfig) -> bool:
    """Whether weights that came from another checkpoint and stay as they are are left out."""
    chosen = config.checkpoint.weights
    return chosen == "trained" or (chosen == "auto" and config.lora.rank > 0)
