"""Name of a stage -> its facts and its class; the only place that knows all three.

Importing this loads no torch: the facts alone say what checks and plans need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.stage_facts import StageFacts
from megatron_kosmosg.stages.align_facts import ALIGN
from megatron_kosmosg.stages.instruct_facts import INSTRUCT
from megatron_kosmosg.stages.pretrain_facts import PRETRAIN

if TYPE_CHECKING:
    from megatron_kosmosg.parallel.layout import Layout
    from megatron_kosmosg.score.remote import RemoteScore
    from megatron_kosmosg.stages.held_out_pictures import PictureJudge
    from megatron_kosmosg.training.stage import Stage

_FACTS = {facts.name: facts for facts in (PRETRAIN, ALIGN, INSTRUCT)}


def stage_facts(name: str) -> StageFacts:
    """What is to know of the stage `name` without building it."""
    return _FACTS[name]


def build_stage(
    config: RunConfig,
    layout: Layout,
    remote_score: RemoteScore | None = None,
    picture_judge: PictureJudge | None = None,
) -> Stage:
    """The stage named by `config.stage`. remote_score: the score ranks of `instruct`, opened by
    who trains; picture_judge: measures what it draws."""
    from megatron_kosmosg.stages.align import AlignStage
    from megatron_kosmosg.stages.instruct import InstructStage
    from megatron_kosmosg.stages.pretrain import PretrainStage

    if config.stage == "instruct":
        return InstructStage(config, layout, remote_score, picture_judge)
    return {"pretrain": PretrainStage, "align": AlignStage}[config.stage](config, layout)
