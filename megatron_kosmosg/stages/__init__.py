"""Name of a stage -> its facts and its class; the only place that knows all three.

Importing this loads no torch: the facts alone say what checks and plans need, and a class is
imported when it is built.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.stage_facts import StageFacts
from megatron_kosmosg.stages.facts import ALIGN, INSTRUCT, PRETRAIN

if TYPE_CHECKING:
    from megatron_kosmosg.evaluation.evaluator import Evaluator
    from megatron_kosmosg.parallel.context import ParallelContext
    from megatron_kosmosg.score.remote import RemoteScore
    from megatron_kosmosg.training.stage import Stage

_FACTS = {facts.name: facts for facts in (PRETRAIN, ALIGN, INSTRUCT)}

_CLASSES = {
    "pretrain": "megatron_kosmosg.stages.pretrain:PretrainStage",
    "align": "megatron_kosmosg.stages.align:AlignStage",
    "instruct": "megatron_kosmosg.stages.instruct:InstructStage",
}
"""{name: module:class}; all are built alike."""


def stage_facts(name: str) -> StageFacts:
    """What is to know of the stage `name` without building it."""
    return _FACTS[name]


def build_stage(
    config: RunConfig,
    context: ParallelContext,
    remote_score: RemoteScore | None = None,
    evaluators: Mapping[str, Evaluator] = MappingProxyType({}),
) -> Stage:
    """The stage named by `config.stage`, ready for `training.loop.fit`.

    Args:
        config: the whole run's config.
        context: this rank's place, as `parallel.platform.initialize` gives it.
        remote_score: the links to score ranks of `instruct`, opened by who trains.
        evaluators: measure what the stage draws, by name.
    """
    return pkgutil.resolve_name(_CLASSES[config.stage])(config, context, remote_score, evaluators)
