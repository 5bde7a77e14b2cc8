"""What is to know of each stage without building it: for checks, plans and conversion.

Beside the classes of the stages, in a file that loads no torch.
"""

from __future__ import annotations

from megatron_kosmosg.config.stage_facts import StageFacts

PRETRAIN = StageFacts(
    name="pretrain",
    trained=("embedding", "decoder", "output_layer", "resampler", "vision_encoder"),
    has_output_head=True,
    packs_rows=True,
    folders=("model.vision.path",),
)

ALIGN = StageFacts(
    name="align",
    trained=("aligner_m", "aligner_n"),
    aligner_parts=("M", "N"),
    frozen_helper="clip_text",
    needs=("model.clip_text.path", "checkpoint.load"),
    folders=("model.clip_text.path",),
)

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
