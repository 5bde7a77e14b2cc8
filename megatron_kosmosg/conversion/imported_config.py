"""What an import gives back, and the config of what it writes: the sizes found in the weights and
the user's settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kosmosg.config.errors import ConfigError, ConversionError
from megatron_kosmosg.config.load import flatten, load_config
from megatron_kosmosg.config.schema import RunConfig


@dataclass(frozen=True)
class Imported:
    """Where an import wrote its checkpoint, and what the user should know of it."""

    checkpoint: Path
    """The folder `iter_0000000`, with the config in it."""
    notes: list[str]


def imported_config(
    sizes: Mapping[str, Any],
    settings: Mapping[str, Any],
    config_file: Path | None,
    overrides: Sequence[str],
) -> RunConfig:
    """The config that comes of config_file, settings, sizes and overrides; of these, later ones
    win.

    Args:
        sizes: {dotted key: value} that the weights show; they hold whatever the config file says,
            and an override may only repeat them.
        settings: {dotted key: value} of the import itself, such as where it writes; overrides may
            change them.
        config_file: YAML as `kosmosg train --config` takes it, or None.
        overrides: `section.key=value` of the command line.

    Raises ConversionError for a bad file or override, and for an override that contradicts a size.
    """
    facts = [f"{key}={json.dumps(value)}" for key, value in {**settings, **sizes}.items()]
    try:
        config = load_config(config_file, [*facts, *overrides])
    except ConfigError as error:
        raise ConversionError(str(error)) from None
    result = flatten(config)
    for key, value in sizes.items():
        if result[key] != value:
            raise ConversionError(f"{key}={result[key]} was given, but the model has {value}")
    return config
