"""Keys of earlier versions: files and overrides that name them mean the same today."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_kosmosg.config.errors import ConfigError

RENAMED_KEYS = {"data.max_bad_samples": "data.max_bad_images"}
"""{key of an earlier version: today's}. The earlier ones still load."""

Note = Callable[[str], None]
Layer = dict[str, Any]
"""Nested settings of one file or override."""


def rename_keys(layers: list[tuple[str, Layer]], note: Note) -> None:
    """Moves values from keys of earlier versions to today's, in place, with one note a key.

    layers: (where it comes from, settings). Raises ConfigError where one of them has both keys.
    """
    for old, new in RENAMED_KEYS.items():
        sources = []
        for source, layer in layers:
            if _rename(source, layer, old, new) | _rename_accepted(layer, old, new):
                sources.append(source)
        if sources:
            note(f"{sources[0]}: {old} is called {new} today")


def _rename(source: str, layer: Layer, old: str, new: str) -> bool:
    """Whether the layer had the key `old`."""
    section, _, name = old.rpartition(".")
    holder = _section(layer, section)
    if name not in holder:
        return False
    new_section, _, new_name = new.rpartition(".")
    if new_name in _section(layer, new_section):
        raise ConfigError(f"{source}: {old} is {new} today and both are given; keep that")
    value, target = holder.pop(name), layer
    for part in new_section.split("."):
        target = target.setdefault(part, {})
    target[new_name] = value
    return True


def _rename_accepted(layer: Layer, old: str, new: str) -> bool:
    """Whether checkpoint.accept_changes named `old`; it names `new` now."""
    holder = _section(layer, "checkpoint")
    accepted = holder.get("accept_changes")
    if not isinstance(accepted, list) or old not in accepted:
        return False
    holder["accept_changes"] = [new if name == old else name for name in accepted]
    return True


def _section(layer: Layer, dotted: str) -> Layer:
    """The section of that name; empty where the layer has none."""
    found: Any = layer
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
