"""Keys of earlier versions: files and overrides that name them mean the same today."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_kosmosg.config.errors import ConfigError


@dataclass(frozen=True)
class RenamedKey:
    """What a key of an earlier version is called today, and what its values have become."""

    key: str
    values: Mapping[str, Any] | None = None
    """{value of the earlier version: today's}; None where the values are the same."""

    def today(self, value: Any) -> Any:
        """What `value` is today. Raises KeyError if it never was a value of the key."""
        return value if self.values is None else self.values[str(value)]


RENAMED_KEYS = {
    "data.max_bad_samples": RenamedKey("data.max_bad_images"),
    "logging.picture_judge": RenamedKey("evaluation.grid", {"none": [], "toy": ["toy"]}),
}
"""{key of an earlier version: today's}. The earlier ones still load."""

Note = Callable[[str], None]
Layer = dict[str, Any]
"""Nested settings of one file or override."""


def rename_keys(layers: list[tuple[str, Layer]], note: Note) -> None:
    """Moves values from keys of earlier versions to today's, in place, with one note a key.

    Args:
        layers: (where it comes from, settings).

    Raises ConfigError where one of them has both keys, or a value that the earlier key did not
    have.
    """
    for old, renamed in RENAMED_KEYS.items():
        changes = []
        for source, layer in layers:
            done = (_rename(source, layer, old, renamed), _rename_accepted(layer, old, renamed.key))
            changes += [f"{source}: {change}" for change in done if change is not None]
        if changes:
            note(changes[0])


def _rename(source: str, layer: Layer, old: str, renamed: RenamedKey) -> str | None:
    """What changed; None where the layer does not have the key `old`."""
    section, _, name = old.rpartition(".")
    holder = _section(layer, section)
    if name not in holder:
        return None
    new_section, _, new_name = renamed.key.rpartition(".")
    if new_name in _section(layer, new_section):
        raise ConfigError(f"{source}: {old} is {renamed.key} today and both are given; keep that")
    value, target = holder.pop(name), layer
    try:
        today = renamed.today(value)
    except KeyError:
        raise ConfigError(
            f"{source}: {old}={value} was never one of its values, which were "
            f"{', '.join(renamed.values or ())}; today it is called {renamed.key}"
        ) from None
    for part in new_section.split("."):
        target = target.setdefault(part, {})
    target[new_name] = today
    change = f"{old} is called {renamed.key} today"
    return change if today == value else f"{change}, and {value} is {_as_yaml(today)}"


def _rename_accepted(layer: Layer, old: str, new: str) -> str | None:
    """What changed where checkpoint.accept_changes named `old`; it names `new` now."""
    holder = _section(layer, "checkpoint")
    accepted = holder.get("accept_changes")
    if not isinstance(accepted, list) or old not in accepted:
        return None
    holder["accept_changes"] = [new if name == old else name for name in accepted]
    return f"{old} is called {new} today"


def _section(layer: Layer, dotted: str) -> Layer:
    """The section of that name; empty where the layer has none."""
    found: Any = layer
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _as_yaml(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
