"""Name of a stage -> the class that builds it; the only place that knows all three."""

from __future__ import annotations

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.score.remote import RemoteScore
from megatron_kosmosg.stages.align import AlignStage
from megatron_kosmosg.stages.held_out_pictures import PictureJudge
from megatron_kosmosg.stages.instruct import InstructStage
from megatron_kosmosg.stages.pretrain import PretrainStage
from megatron_kosmosg.training.stage import Stage


def build_stage(
    config: RunConfig,
    layout: Layout,
    remote_score: RemoteScore | None = None,
    picture_judge: PictureJudge | None = None,
) -> Stage:
    """The stage named by `config.stage`. remote_score: the score ranks of `instruct`, opened by
    who trains; picture_judge: measures what it draws."""
    if config.stage == "instruct":
        return InstructStage(config, layout, remote_score, picture_judge)
    return {"pretrain": PretrainStage, "align": AlignStage}[config.stage](config, layout)
