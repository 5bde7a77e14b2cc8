"""PREFIX.json: what a dataset is, written last so that its presence means the dataset is whole.

With a list of shards it is the whole of PREFIX: their files have prefixes of their own.

Read without torch, as plans are made where the data may be but no accelerator is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_kosmosg.config.errors import ConfigError, InputError
from megatron_kosmosg.config.remote_data import url_path
from megatron_kosmosg.config.schema import BlendEntry
from megatron_kosmosg.data.kinds.text import TEXT
from megatron_kosmosg.data.shard_list import ShardEntry, check_order
from megatron_kosmosg.files import write_json
from megatron_kosmosg.foreign_files import parse_json, read_file, read_json

FORMAT_VERSION, SHARDS_VERSION = 1, 2
"""Of the manifest of one pair of files, and of one with a list of shards."""
LONGEST = 1000
"""Characters of a text in a manifest."""
LARGEST = 8 << 20
"""Bytes of a manifest, most of it the list of shards; larger corpora of one JSON value are not read
to tell that they are none."""


@dataclass(frozen=True)
class Manifest:
    """The content of PREFIX.json: what the dataset is made of, and by what."""

    kind: str
    """A name in data.kinds.KINDS."""
    tokenizer_fingerprint: str
    vocab_size: int
    num_samples: int
    num_tokens: int
    """Text tokens, without document ends and image positions."""
    num_images: int
    num_rejects: int
    format_version: int = FORMAT_VERSION
    shards: tuple[ShardEntry, ...] = ()
    """None where PREFIX.bin and PREFIX.idx are the data."""

    def write(self, path: Path) -> None:
        """Writes the manifest as JSON."""
        fields = asdict(self)
        if not self.shards:
            del fields["shards"]
        write_json(path, fields)

    @staticmethod
    def read(path: Path) -> Manifest:
        """The manifest at `path`. Raises InputError for another format version or broken file."""
        try:
            fields = read_json(path)
            version = fields["format_version"]
            shards = fields.pop("shards", None)
            if version != (FORMAT_VERSION if shards is None else SHARDS_VERSION):
                raise ValueError(
                    f"format version {version}, this code reads {FORMAT_VERSION}, and "
                    f"{SHARDS_VERSION} with shards"
                )
            check_fields(fields, Manifest)
            found = Manifest(**fields, shards=_entries([] if shards is None else shards))
            if shards is not None:
                check_order(found.shards, found.num_samples)
            return found
        except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
            raise InputError(f"{path} is not a readable manifest: {error}") from error


def _entries(values: Any) -> tuple[ShardEntry, ...]:
    """The shards that a manifest's JSON lists. Raises ValueError and TypeError for other values."""
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError("shards is no list of objects")
    for value in values:
        check_fields(value, ShardEntry)
    return tuple(ShardEntry(**value) for value in values)


def check_fields(fields: dict[str, Any], manifest: type) -> None:
    """Raises ValueError where a text or a count of a manifest is something else, or impossible."""
    for field in dataclasses.fields(manifest):
        value = fields.get(field.name, "" if field.type == "str" else 0)
        if field.type == "str" and not (isinstance(value, str) and len(value) <= LONGEST):
            raise ValueError(f"{field.name} is no text of up to {LONGEST} characters")
        if field.type == "int" and (type(value) is not int or not 0 <= value < 1 << 63):
            raise ValueError(f"{field.name} is no count: {str(value)[:40]}")


def is_manifest(path: Path) -> bool:
    """Whether that is the manifest of a dataset, or of a cache beside one, of any version."""
    try:
        fields = parse_json(read_file(path, LARGEST))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and {"format_version", "num_samples"} <= fields.keys()


def manifest_path(prefix: str | Path) -> Path:
    """The path of a dataset's manifest: PREFIX.json."""
    return Path(f"{prefix}.json")


def kind_on_disk(prefix: str | Path) -> str | None:
    """Kind of the dataset under a prefix; None when there is none on this machine.

    Without a manifest it is a token dataset that another tool wrote: text. Raises InputError for a
    manifest that cannot be read.
    """
    if manifest_path(prefix).exists():
        return Manifest.read(manifest_path(prefix)).kind
    data = Path(f"{prefix}.bin")
    return TEXT.name if data.exists() or url_path(data).exists() else None


def dataset_kind(key: str, entry: BlendEntry) -> str | None:
    """Kind of a dataset of the config: that on disk, else `entry.kind`; None when neither says.

    Args:
        key: where the config has the entry, e.g. `data.blend.laion`.

    Raises ConfigError when the two differ, and for a manifest that cannot be read.
    """
    try:
        found = kind_on_disk(entry.path)
    except InputError as error:
        raise ConfigError(f"{key}.path={entry.path}: {error}") from None
    if found is None:
        return entry.kind
    if entry.kind is not None and entry.kind != found:
        raise ConfigError(
            f"{key}.kind={entry.kind}, but the dataset {entry.path} is of kind {found}; correct "
            f"{key}.kind or {key}.path"
        )
    return found
