"""Whether this machine has what a stage reads and may write where it writes, before ranks start.

Nothing is changed, and no file is opened but lists of shards and the folders of frozen networks,
for the names in them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from megatron_kosmosg.config.dataset_prefixes import missing_files, remote_urls
from megatron_kosmosg.config.errors import ConfigError, InputError
from megatron_kosmosg.config.frozen_weights import missing_parts, one_file_advice
from megatron_kosmosg.config.import_advice import how_to_import
from megatron_kosmosg.config.paths import COMPLETE_FILE, output_folder, save_folder
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.stage_facts import StageFacts


def validate_files(config: RunConfig, facts: StageFacts) -> None:
    """Raises ConfigError for all that the stage needs and this machine does not have."""
    check_stage_needs(config, facts)
    missing = list(_missing_files(config, facts))
    if len(missing) > 1:
        raise ConfigError(f"{len(missing)} inputs are missing:\n  " + "\n  ".join(missing))
    if missing:
        raise ConfigError(missing[0])
    check_writable("logging.output_dir", output_folder(config))
    check_writable("checkpoint.save", save_folder(config))


def _missing_files(config: RunConfig, facts: StageFacts) -> Iterator[str]:
    """A sentence for each; folders of frozen networks are opened, for their weights' names."""
    tokenizer = config.data.tokenizer_model
    if tokenizer is not None and not Path(tokenizer).is_file():
        yield f"data.tokenizer_model={tokenizer}: no such file"
    for section, blend in (
        ("data.blend", config.data.blend),
        ("data.heldout", config.data.heldout),
    ):
        for name, entry in blend.items():
            absent = missing_files(entry.path)
            if absent:
                more = f" (nor do {len(absent) - 1} others)" if len(absent) > 2 else ""
                yield (
                    f"{section}.{name}.path={entry.path}: {absent[0]} does not exist{more}; "
                    "write the dataset with `kosmosg preprocess` or correct the prefix (it has no "
                    "suffix)"
                )
            try:
                remote_urls(entry.path)
            except InputError as error:
                yield f"{section}.{name}.path={entry.path}: {error}"
    for key in facts.folders:
        folder = _value(config, key)
        if folder is None:
            continue
        if Path(folder).is_dir():
            yield from missing_parts(key, Path(folder))
        else:
            advice = one_file_advice(folder)
            yield f"{key}={folder} {advice}" if advice else f"{key}={folder}: no such folder"
    if not any(save_folder(config).glob("iter_*")):  # a resumed run reads its own checkpoints
        yield from _missing_initial_weights(config.checkpoint.load)


def check_stage_needs(config: RunConfig, facts: StageFacts) -> None:
    """Raises ConfigError for settings that the stage needs or cannot use, whatever this machine
    has."""
    if config.data.latent_cache is not None and not facts.has_unet:
        raise ConfigError(
            f"data.latent_cache={config.data.latent_cache} means nothing to stage={config.stage}: "
            "only instruct has target images; set data.latent_cache=null"
        )
    for key, interval in (
        ("training.eval_interval", config.training.eval_interval),
        ("logging.image_interval", config.logging.image_interval),
        ("evaluation.every", config.evaluation.every),
    ):
        if interval and not config.data.heldout:
            raise ConfigError(
                f"{key}={interval} needs held-out data; give data.heldout.NAME.path, or set {key}=0"
            )
    needed = ("data.tokenizer_model", "data.blend", *facts.needs)
    absent = [key for key in needed if not _value(config, key)]
    if absent:
        raise ConfigError(f"stage={config.stage} needs a value for {', '.join(absent)}")


def _value(config: RunConfig, key: str) -> Any:
    """The value of the setting with that dotted name."""
    return reduce(getattr, key.split("."), config)


def _missing_initial_weights(path: str | None) -> Iterator[str]:
    if path is None:
        return
    folder = Path(path)
    advice = how_to_import(folder)
    if advice is not None:
        yield f"checkpoint.load={path} is no checkpoint; {advice}"
    elif not folder.is_dir():
        yield f"checkpoint.load={path}: no such folder"
    elif not any(
        (place / COMPLETE_FILE).is_file()
        for place in (folder, *folder.glob("iter_*"), *folder.glob("checkpoints/iter_*"))
    ):
        yield (
            f"checkpoint.load={path} holds no finished checkpoint ({COMPLETE_FILE}), there or in "
            "its iter_* folders; has that run saved one?"
        )


def check_writable(key: str, folder: Path) -> None:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"{key}={folder}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={folder}: no permission to write in {existing}")
