"""Where the sentence tables (sentences.py) of a dataset lie."""

from __future__ import annotations

from pathlib import Path


def sentence_paths(prefix: str | Path) -> tuple[Path, Path]:
    """The sentence table and the offsets of each sample in it."""
    return Path(f"{prefix}.sentences.npy"), Path(f"{prefix}.sentence_offsets.npy")
