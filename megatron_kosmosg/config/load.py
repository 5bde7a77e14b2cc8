"""A RunConfig from defaults <- YAML <- `section.key=value`, and back to YAML.

The only importer of OmegaConf. Names are checked against the dataclasses before anything is
merged, so that every unknown key is reported with its full path and the nearest existing name.

Long because every way in which a layer can be wrong has its own words.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.input_paths import CONFIGS, locate_inputs, shipped_configs
from megatron_kosmosg.config.known_keys import mapped_section, refuse_unknown_keys
from megatron_kosmosg.config.renamed_keys import Layer, Note, rename_keys
from megatron_kosmosg.config.schema import RunConfig


def load_config(
    path: str | Path | None, overrides: list[str], *, note: Note | None = None
) -> RunConfig:
    """The config of a run: the schema's defaults, then the YAML file, then the overrides, in this
    order.

    A file may start from another one, named by its key `include` (relative to itself, or a shipped
    name), and drop what that one has by setting it to null: one entry of data.blend, say, or all of
    data.heldout. input_paths.py says what relative paths in it mean.

    Args:
        path: a YAML file, or the name of a shipped config, such as `toy_instruct`; None takes
            defaults.
        overrides: settings as `section.key=value`, of which later ones win.
        note: is told each key that is called something else today; by default it goes to stderr.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or of another type.
    """
    merged = OmegaConf.structured(RunConfig)
    for source, layer in _layers(path, overrides, _on_stderr if note is None else note):
        refuse_unknown_keys(source, layer)
        try:
            OmegaConf.set_readonly(merged, False)
            _drop(source, layer, merged)
            merged = OmegaConf.unsafe_merge(merged, OmegaConf.create(layer))
            assert isinstance(merged, DictConfig)
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(source, error)) from None
        except OverflowError:  # that a whole number gives where a float is meant
            key = next(_too_large(layer), "a setting")
            raise ConfigError(f"{source}: {key}: the number is too large") from None
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
    nobody's to correct: no note.

    It may be of somebody else, and a run writes plain values alone. Raises ConfigError for one
    that would read other files or the environment (`include`, `${...}`), and like load_config.
    """
    content = read_yaml(Path(path), "--config")
    asking = [key for key, value in _flat_items(content, "") if _is_interpolation(value)]
    if "include" in content:
        asking.append("include")
    if asking:
        raise ConfigError(
            f"{path}: {', '.join(asking[:4])} would read other files or the environment; the "
            "config of a checkpoint holds plain values alone, so it is not read"
        )
    return load_config(path, [], note=_silently)


def config_files(path: str | Path) -> list[Path]:
    """The file that `load_config` would read, after those that it includes."""
    layers = _file_layers(_find_config(Path(path)), ())
    return [file for _, _, file in layers if file is not None]


def is_saved_config(path: Path) -> bool:
    """Whether the file is one that a run left and nobody changed: written again, it is the same."""
    try:
        return path.read_text(encoding="utf-8") == to_yaml(load_saved_config(path))
    except ConfigError:
        return False


def configured_keys(path: str | Path | None, overrides: list[str]) -> set[str]:
    """Dotted keys that the file (with what it includes) or an override sets; no defaults."""
    return {
        key for _, layer in _layers(path, overrides, _silently) for key, _ in _flat_items(layer, "")
    }


def to_yaml(config: RunConfig) -> str:
    """The whole config as YAML that `load_config` reads back to an equal RunConfig."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every setting of the config as {dotted key: plain value}."""
    return dict(_flat_items(dataclasses.asdict(config), ""))


def config_differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, as {dotted key: (old value, new value)}; a setting that one side
    lacks is None there."""
    before, after = flatten(old), flatten(new)
    keys = sorted(before.keys() | after.keys())
    return {
        key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    }


def _layers(path: str | Path | None, overrides: list[str], note: Note) -> list[tuple[str, Layer]]:
    """The sources of settings in the order in which they are merged, each as (where it comes from,
    its settings by today's keys)."""
    read: list[tuple[str, Layer, Path | None]] = []
    if path is not None:
        read.extend(_file_layers(_find_config(Path(path)), ()))
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"{override!r} is not an override; write section.key=value, "
                "for example training.train_iters=100"
            )
        read.append((f"override {override!r}", _from_dotlist(override), None))
    layers = [(source, layer) for source, layer, _ in read]
    rename_keys(layers, note)
    for _, layer, file in read:
        if file is not None:
            locate_inputs(layer, file)
    return layers


def _find_config(path: Path) -> Path:
    """The file, or the shipped config of that name. Raises ConfigError if there is neither."""
    if path.suffix or len(path.parts) != 1 or os.path.exists(path):
        return path
    shipped = CONFIGS / f"{path}.yaml"
    if not os.path.isfile(shipped):
        near = difflib.get_close_matches(str(path), shipped_configs(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--config {path}: neither a file nor a shipped config; {hint}shipped are "
            f"{', '.join(shipped_configs())}"
        )
    return shipped


def _drop(source: str, layer: Layer, merged: DictConfig) -> None:
    """Takes out of `merged` the entries of mappings that the layer sets to null, and the nulls."""
    for section, content in layer.items():
        if section not in merged or not isinstance(content, dict):
            continue
        for name in [n for n in content if _is_mapping(section, n)]:
            entries = content[name]
            OmegaConf.set_readonly(merged[section], False)
            if entries is None:
                del content[name]
                merged[section][name] = {}
                continue
            for entry in [e for e, value in entries.items() if value is None]:
                if entry not in merged[section][name]:
                    raise ConfigError(
                        f"{source}: {section}.{name}.{entry} is null, which drops an entry of "
                        f"that name; there are {', '.join(merged[section][name]) or 'none'}"
                    )
                del entries[entry], merged[section][name][entry]


def _is_mapping(section: str, name: str) -> bool:
    """Whether `section.name` is a mapping of free names, such as data.blend."""
    annotation = typing.get_type_hints(typing.get_type_hints(RunConfig)[section]).get(name)
    return mapped_section(annotation) is not None


def _on_stderr(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def _silently(message: str) -> None:
    """Takes a note and shows it to nobody: the default of `load_config`."""


def _file_layers(path: Path, including: tuple[Path, ...]) -> list[tuple[str, Layer, Path | None]]:
    """The file, after the one that its `include` names, if any."""
    if path.resolve() in including:
        raise ConfigError(f"--config {path} includes itself")
    content = read_yaml(path, "--config")
    included = content.pop("include", None)
    if included is None:
        return [(str(path), content, path)]
    if not isinstance(included, str):
        raise ConfigError(
            f"{path}: include is {included!r}; it has to be the name of one config file"
        )
    beside = path.parent / included
    found = beside if os.path.isfile(beside) else _find_config(Path(included))
    base = _file_layers(found, (*including, path.resolve()))
    return [*base, (str(path), content, path)]


def read_yaml(path: Path, what: str) -> Layer:
    """The mapping that a file holds, its interpolations as they are written.

    Raises ConfigError, which calls the file `what`, for one that cannot be read or is no mapping.
    """
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{what} {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None
    except Exception as error:  # the YAML reader's own error types are not part of OmegaConf's API
        raise ConfigError(f"{what} {path} is not valid YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{what} {path} must hold a mapping")
    return _plain(loaded)


def _from_dotlist(override: str) -> Layer:
    try:
        return _plain(OmegaConf.from_dotlist([override]))
    except Exception as error:  # as in read_yaml: the value part is YAML
        raise ConfigError(f"override {override!r} cannot be read: {error}") from None


def _plain(settings: DictConfig) -> Layer:
    """Nested dictionaries; interpolations stay as they are written."""
    plain = OmegaConf.to_container(settings, resolve=False)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def _flat_items(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat_items(inner, f"{prefix}.{name}" if prefix else name)
    elif not isinstance(value, dict):
        yield prefix, value


def _is_interpolation(value: Any) -> bool:
    if isinstance(value, list):
        return any(_is_interpolation(entry) for entry in value)
    if isinstance(value, dict):
        return any(_is_interpolation(entry) for pair in value.items() for entry in pair)
    return isinstance(value, str) and "${" in value


def _too_large(value: Any, key: str = "") -> Iterator[str]:
    """Keys of the whole numbers in `value` that no float holds."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _too_large(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for entry in value:
            yield from _too_large(entry, key)
    elif isinstance(value, int) and abs(value) > sys.float_info.max:
        yield key


def _explain(source: str, error: OmegaConfBaseException) -> str:
    first_line = str(error).splitlines()[0]
    key = error.full_key or error.key
    return f"{source}: {key}: {first_line}" if key else f"{source}: {first_line}"
