"""What is to know of `instruct` without building it."""

from __future__ import annotations

from megatron_kosmosg.config.stage_facts import StageFacts

INSTRUCT = StageFacts(
    name="instruct",
    trained=("embedding", "decoder", "resampler", "vision_encoder", "aligner_m"),
    aligner_parts=("M",),
    frozen_helper="diffusion",
    deals_by_length=True,
    has_null_row=True,
    needs=("model.diffusion.path", "checkpoint.load"),
    folders=("model.diffusion.path",),
)
