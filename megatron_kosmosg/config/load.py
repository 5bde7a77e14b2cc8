"""A RunConfig from defaults <- YAML <- `section.key=value`, and back to YAML.

The only importer of OmegaConf. Names are checked against the dataclasses before anything is
merged, so that every unknown key is reported with its full path and the nearest existing name.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.renamed_keys import Layer, Note, rename_keys
from megatron_kosmosg.config.schema import RunConfig


def load_config(
    path: str | Path | None, overrides: list[str], *, note: Note | None = None
) -> RunConfig:
    """The run's config: schema defaults, then the YAML file, then `a.b=value` strings in order.

    A file may start from another one, named by its key `include` relative to itself.

    note: is told each key that is called something else today; by default it goes to stderr.

    Raises ConfigError for an unreadable file, an unknown or missing key, a value of another type.
    """
    merged = OmegaConf.structured(RunConfig)
    for source, layer in _layers(path, overrides, _on_stderr if note is None else note):
        _refuse_unknown_keys(source, layer)
        try:
            OmegaConf.set_readonly(merged, False)
            merged = OmegaConf.unsafe_merge(merged, OmegaConf.create(layer))
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(source, error)) from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(
            f"no value for {', '.join(missing)}; set it in the config file or on the command "
            f"line as {missing[0]}=..."
        )
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain("config", error)) from None
    assert isinstance(config, RunConfig)
    return config


def load_saved_config(path: str | Path) -> RunConfig:
    """The config that a run left at `path`. Its keys may be those of an earlier version, which is
    nobody's to correct: no note."""
    return load_config(path, [], note=_silently)


def given_keys(path: str | Path | None, overrides: list[str]) -> set[str]:
    """Dotted keys that the file (with what it includes) or an override sets; no defaults."""
    return {
        key for _, layer in _layers(path, overrides, _silently) for key, _ in _flat_items(layer, "")
    }


def to_yaml(config: RunConfig) -> str:
    """The whole config as YAML that `load_config` reads back to an equal RunConfig."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: RunConfig) -> dict[str, Any]:
    """{dotted key: plain value} of every leaf setting."""
    return dict(_flat_items(dataclasses.asdict(config), ""))


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} of the settings that differ; absent values are None."""
    before, after = flatten(old), flatten(new)
    keys = sorted(before.keys() | after.keys())
    return {
        key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    }


def known_keys() -> list[str]:
    """Dotted names of all settings; NAME stands for a free entry name of a mapping."""
    return [name for name, _ in _schema_leaves(RunConfig, "")]


def _layers(path: str | Path | None, overrides: list[str], note: Note) -> list[tuple[str, Layer]]:
    """[(where it comes from, settings by today's keys)] in the order in which they are merged."""
    read: list[tuple[str, DictConfig]] = []
    if path is not None:
        read.extend(_file_layers(Path(path), ()))
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"{override!r} is not an override; write section.key=value, "
                "for example training.train_iters=100"
            )
        read.append((f"override {override!r}", _from_dotlist(override)))
    layers = [(source, OmegaConf.to_container(layer, resolve=False)) for source, layer in read]
    rename_keys(layers, note)
    return layers


def _on_stderr(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def _silently(message: str) -> None:
    """For whoever has nobody to tell."""


def _file_layers(path: Path, including: tuple[Path, ...]) -> list[tuple[str, DictConfig]]:
    """The file, after the one that its `include` names (relative to it), if any."""
    if path.resolve() in including:
        raise ConfigError(f"--config {path} includes itself")
    content = _read_yaml(path)
    included = content.pop("include", None)
    if included is None:
        return [(str(path), content)]
    base = _file_layers(path.parent / included, (*including, path.resolve()))
    return [*base, (str(path), content)]


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except Exception as error:  # the YAML reader's own error types are not part of OmegaConf's API
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"--config {path} must hold a mapping of sections")
    return loaded


def _from_dotlist(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # as in _read_yaml: the value part is YAML
        raise ConfigError(f"override {override!r} cannot be read: {error}") from None


def _schema_leaves(schema: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, annotation in typing.get_type_hints(schema).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(annotation):
            yield from _schema_leaves(annotation, f"{key}.")
        elif _mapped_section(annotation) is not None:
            yield from _schema_leaves(_mapped_section(annotation), f"{key}.NAME.")
        else:
            yield key, annotation


def _mapped_section(annotation: Any) -> type | None:
    """The dataclass D of a `dict[str, D]` annotation, else None."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict and dataclasses.is_dataclass(arguments[1]):
        return arguments[1]
    return None


def _refuse_unknown_keys(
    source: str, given: Any, schema: Any = RunConfig, prefix: str = ""
) -> None:
    if not isinstance(given, dict):
        return
    hints = typing.get_type_hints(schema)
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise ConfigError(f"{source}: unknown key {key}{_suggest(key)}")
        section = _mapped_section(hints[name])
        if dataclasses.is_dataclass(hints[name]):
            _refuse_unknown_keys(source, value, hints[name], f"{key}.")
        elif section is not None and isinstance(value, dict):
            for entry, content in value.items():
                _refuse_unknown_keys(source, content, section, f"{key}.{entry}.")


def _suggest(key: str) -> str:
    """`; did you mean ...?` with the closest existing name, or the sections if none is near."""
    sections = [item.name for item in dataclasses.fields(RunConfig)]
    names = known_keys() + sections
    leaf = key.rsplit(".", 1)[-1]
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


def _flat_items(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat_items(inner, f"{prefix}.{name}" if prefix else name)
    elif not isinstance(value, dict):
        yield prefix, value


def _explain(source: str, error: OmegaConfBaseException) -> str:
    first_line = str(error).splitlines()[0]
    key = error.full_key or error.key
    return f"{source}: {key}: {first_line}" if key else f"{source}: {first_line}"
