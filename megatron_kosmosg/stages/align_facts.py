"""What is to know of `align` without building it."""

from __future__ import annotations

from megatron_kosmosg.config.stage_facts import StageFacts

ALIGN = StageFacts(
    name="align",
    trained=("aligner_m", "aligner_n"),
    aligner_parts=("M", "N"),
    frozen_helper="clip_text",
    needs=("model.clip_text.path", "checkpoint.load"),
    folders=("model.clip_text.path",),
)
