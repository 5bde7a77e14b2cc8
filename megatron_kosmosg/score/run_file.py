"""Where score ranks find a run: one file in its folder, readable by its owner alone.

It holds the decoder ranks' addresses and the key of this start of the run. Whoever can read it can
join; a start writes new keys, so an old file opens nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.config.paths import SCORE_RANKS_FILE
from megatron_kosmosg.files import replacing
from megatron_kosmosg.foreign_files import read_json
from megatron_kosmosg.score.member import DecoderAddress

_VERSION = 1
_ONLY_OWNER = 0o600


@dataclass(frozen=True)
class RunAddress:
    """A start of a run that score ranks can join."""

    start: str
    """Of this start alone."""
    config: str
    """Hash of the run's config.yaml as this start writes it."""
    public: str
    secret: str
    """Key of the score ranks, z85."""
    decoders: tuple[DecoderAddress, ...]


def config_hash(text: str) -> str:
    """A hash of the text of a config.yaml."""
    return hashlib.blake2b(text.encode(), digest_size=12, person=b"kosmosg-config").hexdigest()


def publish(folder: Path, address: RunAddress) -> None:
    """Writes the file, in place of an earlier start's."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SCORE_RANKS_FILE, only_writer=True) as temporary:
        os.chmod(temporary, _ONLY_OWNER)  # while it is empty
        temporary.write_text(json.dumps({"version": _VERSION} | asdict(address)) + "\n")


def withdraw(folder: Path, start: str) -> None:
    """Removes the file if it is still of this start."""
    found = find(folder)
    if found is not None and found.start == start:
        (folder / SCORE_RANKS_FILE).unlink(missing_ok=True)


def find(folder: Path) -> RunAddress | None:
    """The start of the run in `folder` that can be joined; None: there is none.

    Raises InputError for a file that others can read, or that is not this program's.
    """
    path = folder / SCORE_RANKS_FILE
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None
    if mode & ~_ONLY_OWNER:
        raise InputError(
            f"{path} has mode {mode:o}, so others have the run's key; it must be 600: stop the run "
            "and start it again on a file system that keeps permissions"
        )
    try:
        found = read_json(path)
        if found.pop("version") != _VERSION:
            raise InputError(f"{path} was written by another version of this program")
        decoders = tuple(DecoderAddress(**decoder) for decoder in found.pop("decoders"))
        return RunAddress(**found, decoders=decoders)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not what a run writes: {error}") from error
