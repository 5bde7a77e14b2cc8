"""A short name for the contents of model files, so that results of another model are not kept.

Of every file the name, the size and samples of its bytes count, which takes a moment even for
large models; training changes all weights, so that samples notice it. The location does not count.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SAMPLES, SAMPLE_BYTES = 64, 4096
"""Per file, spread evenly from the first byte to the last."""


def fingerprint(*paths: Path) -> str:
    """16 hexadecimal digits for the contents of files and folders (without hidden files)."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        for file in [path] if path.is_file() else _files(path):
            size = file.stat().st_size
            # A file given by itself may be renamed.
            name = "" if file == path else file.relative_to(path).as_posix()
            digest.update(f"{name}|{size}|".encode())
            _add_samples(file, size, digest)
        digest.update(b"|next|")
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _add_samples(path: Path, size: int, digest: hashlib.blake2b) -> None:
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
            return
        for i in range(SAMPLES):
            file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
