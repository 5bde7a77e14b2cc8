"""The optimizer's state of a checkpoint that another kind of Megatron-Core's optimizers wrote.

The distributed one, the plain one of 16-bit parameters and that of float32 parameters store the
same float32 weights and Adam moments of every parameter, and the same parameter groups; the weights
under other keys (not at all where the model's own are float32), the groups at another depth. So the
state is asked for in the checkpoint's form, and handed on in this run's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase

from megatron_kosmosg.checkpoint.weights import MODEL
from megatron_kosmosg.config.schema import RunConfig

Form = Literal["distributed", "float16", "float32"]
_WEIGHTS = {"distributed": "optimizer.state.param.", "float16": "optimizer.state.fp32_param."}
"""What the keys of the float32 weights begin with."""


def optimizer_form(config: RunConfig) -> Form:
    """The kind of optimizer that a run with this config has."""
    if config.parallel.use_distributed_optimizer:
        return "distributed"
    return "float32" if config.training.precision == "fp32" else "float16"


class FormChange:
    """From the form of a checkpoint to that of the run which reads it."""

    def __init__(self, saved: RunConfig, current: RunConfig, sharding_type: str) -> None:
        """Compares the two kinds of optimizer.

        Args:
            saved: config of the run that wrote the checkpoint.
            current: config of the run that reads it.
            sharding_type: how the distributed optimizer splits its state (`checkpoint_metadata`).
        """
        self._saved, self._current = optimizer_form(saved), optimizer_form(current)
        self._sharding_type = sharding_type
        self._weights: dict[int, str] = {}
        """Where float32 weights are to be put that the checkpoint has in the model alone:
        {parameter: key of the model's}."""

    def adapt_request(self, sharded_state: dict[str, Any]) -> None:
        """Makes of `sharded_state`, which this run would load, what the checkpoint has."""
        if self._saved == self._current or self._current == "float32":
            return
        optimizer, prefix = sharded_state["optimizer"], _WEIGHTS[self._current]
        if self._saved == "float32" and self._current == "distributed":
            for parameter, entries in optimizer["param_state"].items():
                self._weights[parameter] = entries.pop("param").key.removeprefix(prefix)
            return
        for entry in _sharded(nested_values(optimizer)):
            if entry.key.startswith(prefix):
                entry.key = _WEIGHTS.get(self._saved, "") + entry.key.removeprefix(prefix)

    def adapt_loaded(self, sharded_state: dict[str, Any], loaded: dict[str, Any]) -> None:
        """Makes of `loaded`, read for `sharded_state`, what this run's optimizer loads."""
        if self._saved == self._current:
            return
        optimizer = loaded["optimizer"]
        if self._current == "float32":
            _take_groups(optimizer, optimizer.pop("optimizer")["param_groups"])
            return
        if self._saved == "float32":
            groups = optimizer.pop("param_groups")
            _take_groups(optimizer.setdefault("optimizer", {}), groups)
        if self._current == "distributed":
            optimizer["param_state_sharding_type"] = self._sharding_type
            values = _model_values(sharded_state, loaded) if self._weights else {}
            for parameter, key in self._weights.items():
                optimizer["param_state"][parameter]["param"] = values[key]


def _take_groups(state: dict[str, Any], saved: list[dict[str, Any]]) -> None:
    """Puts the saved settings of each group beside the parameters of this run's, if it lists any.

    Megatron-Core has a group for each kind of learning rate and weight decay: one here, on every
    rank and in every form.
    """
    local = state.get("param_groups", [{} for _ in saved])
    state["param_groups"] = [
        {**settings, **group} for settings, group in zip(saved, local, strict=True)
    ]


def _model_values(sharded_state: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    return {
        entry.key: loaded[part][name]
        for part, entries in sharded_state.items()
        if part.startswith(MODEL)
        for name, entry in entries.items()
        if isinstance(entry, ShardedBase)
    }


def _sharded(values: Iterable[Any]) -> list[ShardedBase]:
    return [value for value in values if isinstance(value, ShardedBase)]
