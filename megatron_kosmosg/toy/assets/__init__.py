"""Frozen parts of the toy world that come with the package: tokenizer, image tower, decoder."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder that holds the frozen parts."""
    return Path(__file__).resolve().parent
