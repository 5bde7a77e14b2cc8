"""The settings that exist, by their dotted names, and what an unknown one may have meant."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig


def known_keys() -> list[str]:
    """Dotted names of all settings; NAME stands for a free entry name of a mapping."""
    return [name for name, _ in _schema_leaves(RunConfig, "")]


def refuse_unknown_keys(
    source: str, settings: Any, schema: Any = RunConfig, prefix: str = ""
) -> None:
    """Raises ConfigError for a name that does not exist, and for a plain value where settings
    belong.

    Args:
        source: where the settings stand, for the message.
        settings: as nested mappings, such as a YAML file has.
        schema: the dataclass that says which names there are: RunConfig, or a section of it, since
            this calls itself for each section.
        prefix: dotted name of the section with a dot behind it; empty for the whole config.
    """
    hints = typing.get_type_hints(schema)
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise ConfigError(f"{source}: unknown key {key}{_suggest(key)}")
        section = mapped_section(hints[name])
        if dataclasses.is_dataclass(hints[name]):
            _refuse_no_settings(source, key, value, hints[name])
            refuse_unknown_keys(source, value, hints[name], f"{key}.")
        elif section is not None and value is not None:
            _refuse_no_settings(source, key, value, None)
            # Entries (data.blend.NAME) may have any name; null drops one of an included file.
            for entry, content in value.items():
                if content is not None:
                    _refuse_no_settings(source, f"{key}.{entry}", content, section)
                    refuse_unknown_keys(source, content, section, f"{key}.{entry}.")


def _refuse_no_settings(source: str, key: str, value: Any, schema: Any) -> None:
    """Raises ConfigError where `key` has a plain value although it holds further settings. `schema`
    is the dataclass of these, or None where its entries have free names."""
    if not isinstance(value, dict):
        names = "NAME" if schema is None else next(iter(typing.get_type_hints(schema)))
        raise ConfigError(
            f"{source}: {key} is {value!r}, but holds settings of its own, such as {key}.{names}"
        )


def _suggest(key: str) -> str:
    """The end of the message on an unknown key: "; did you mean ...?" with the closest existing
    names, or the names of the sections where none is close."""
    sections = [item.name for item in dataclasses.fields(RunConfig)]
    names = known_keys() + sections
    leaf = key.rsplit(".", 1)[-1]
    # First a right name in the wrong section, then a misspelt whole, last a misspelt end.
    same_leaf = [name for name in names if name.rsplit(".", 1)[-1] == leaf]
    near = same_leaf or difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if not near:
        near = [
            name
            for match in difflib.get_close_matches(leaf, [n.rsplit(".", 1)[-1] for n in names], n=1)
            for name in names
            if name.rsplit(".", 1)[-1] == match
        ]
    if near:
        return f"; did you mean {' or '.join(near[:2])}?"
    return f"; sections are {', '.join(sections)}"


def _schema_leaves(schema: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, type) of every single setting; sections are followed to their ends."""
    for name, annotation in typing.get_type_hints(schema).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(annotation):
            yield from _schema_leaves(annotation, f"{key}.")
        elif (section := mapped_section(annotation)) is not None:
            yield from _schema_leaves(section, f"{key}.NAME.")
        else:
            yield key, annotation


def mapped_section(annotation: Any) -> type | None:
    """The dataclass D of a section whose entries have free names, which is annotated `dict[str, D]`
    (data.blend); None for everything else."""
    if typing.get_origin(annotation) is not dict:
        return None
    section = typing.get_args(annotation)[1]
    return section if isinstance(section, type) and dataclasses.is_dataclass(section) else None
