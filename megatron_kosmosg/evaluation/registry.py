"""Name of an evaluator -> its class, which is imported when a run asks for it.

The classes are named by strings, because some stand in rooms above this one. Importing this file
loads no torch, so that a mistyped name is answered at once.
"""

from __future__ import annotations

import difflib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig

if TYPE_CHECKING:
    from megatron_kosmosg.evaluation.evaluator import Evaluator

EVALUATORS = {
    "toy": "megatron_kosmosg.toy.evaluation.toy_evaluator:ToyEvaluator",
    "dino": "megatron_kosmosg.evaluation.target_evaluators:DinoEvaluator",
    "clip": "megatron_kosmosg.evaluation.target_evaluators:ClipEvaluator",
}
"""{name in `evaluation.grid`: module:class}."""


def check_evaluators(config: RunConfig) -> None:
    """Raises ConfigError for a name in `evaluation.grid` that no evaluator has, and for one whose
    files are not there: the first evaluation may be hours away."""
    needed = {"dino": config.evaluation.dino, "clip": config.evaluation.clip}
    for name in config.evaluation.grid:
        if name not in EVALUATORS:
            near = difflib.get_close_matches(name, EVALUATORS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"evaluation.grid names {name!r}, which is no evaluator; {hint}there are "
                f"{', '.join(EVALUATORS)}"
            )
        path = needed.get(name, "")
        if path is None or not Path(path).exists():
            raise ConfigError(
                f"evaluation.grid names {name}, and evaluation.{name}={path} is not there; give "
                "its weights"
            )


def build_evaluators(config: RunConfig) -> dict[str, Evaluator]:
    """The evaluators of `evaluation.grid` by name, in its order; errors as in check_evaluators."""
    check_evaluators(config)
    return {name: pkgutil.resolve_name(EVALUATORS[name])(config) for name in config.evaluation.grid}
