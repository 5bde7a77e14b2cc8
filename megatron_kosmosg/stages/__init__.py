"""Name of a stage -> the class that builds it; the only place that knows all three."""

from __future__ import annotations

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.stages.align import AlignStage
from megatron_kosmosg.stages.held_out_pictures import PictureJudge
from megatron_kosmosg.stages.instruct import InstructStage
from megatron_kosmosg.stages.pretrain import PretrainStage
from megatron_kosmosg.training.stage import Stage


def build_stage(
    config: RunConfig, layout: Layout, picture_judge: PictureJudge | None = None
) -> Stage:
    """The stage named by `config.stage`. picture_judge: measures what `instruct` draws."""
    if config.stage == "instruct":
        return InstructStage(config, layout, picture_judge)
    return {"pretrain": PretrainStage, "align": AlignStage}[config.stage](config, layout)
