"""What a checkpoint of trained weights alone says of its base: the checkpoint with the others.

`base.json` names the base, its fingerprint and the weights that are taken from it. The fingerprint
is of the checksums beside the base's tensors: it costs small files to take, and what reads the
tensors compares the checksums.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.files import fingerprint, write_json
from megatron_kosmosg.foreign_files import read_json

BASE_FILE = "base.json"
TENSORS = ".distcp"
"""Ends the names of the files that grow with the model."""
CHECKSUM = ".crc32"
"""Ends the name of the file beside it that has its checksum."""


@dataclass(frozen=True)
class Base:
    """A checkpoint, and what another one takes from it."""

    path: str
    """Its own folder, absolute."""
    fingerprint: str
    weights: dict[str, str]
    """Keys of the weights, and the dtypes in which the run has them ("bfloat16")."""


def read_base(folder: Path) -> Base | None:
    """What the checkpoint in `folder` says; None for one that holds all of its weights. Raises
    ConfigError for what is no such record."""
    path = folder / BASE_FILE
    try:
        found = read_json(path)
        weights = {str(key): str(dtype) for key, dtype in found["weights"].items()}
        return Base(str(found["path"]), str(found["fingerprint"]), weights)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def write_base(folder: Path, base: Base) -> None:
    """Puts the record into a checkpoint that is being written."""
    write_json(folder / BASE_FILE, asdict(base), only_writer=True)


def checkpoint_fingerprint(folder: Path) -> str:
    """A name for the tensors of a whole checkpoint, wherever it lies: two imports of the same
    weights have the same.

    Taken from the checksums of its files; from samples of those files that have none, which are
    imports and checkpoints of before there were any.
    """
    files = sorted(folder.glob(f"*{TENSORS}"))
    checksums = [file.with_name(file.name + CHECKSUM) for file in files]
    return fingerprint(
        *(mark if mark.is_file() else file for mark, file in zip(checksums, files, strict=True))
    )
