"""Name of a stage -> the class that builds it; the only place that knows all three."""

from __future__ import annotations

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.stages.align import AlignStage
from megatron_kosmosg.stages.instruct import InstructStage
from megatron_kosmosg.stages.pretrain import PretrainStage
from megatron_kosmosg.training.stage import Stage

STAGES: dict[str, type] = {
    "pretrain": PretrainStage,
    "align": AlignStage,
    "instruct": InstructStage,
}


def build_stage(config: RunConfig, layout: Layout) -> Stage:
    """The stage named by `config.stage`."""
    return STAGES[config.stage](config, layout)
