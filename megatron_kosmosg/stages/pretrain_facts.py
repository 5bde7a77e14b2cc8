"""What is to know of `pretrain` without building it."""

from __future__ import annotations

from megatron_kosmosg.config.stage_facts import StageFacts

PRETRAIN = StageFacts(
    name="pretrain",
    trained=("embedding", "decoder", "output_layer", "resampler", "vision_encoder"),
    has_output_head=True,
    packs_rows=True,
    folders=("model.vision.path",),
)
