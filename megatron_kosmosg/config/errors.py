"""The errors that say what a user gave, what is needed and the way out."""

from __future__ import annotations


class ConfigError(ValueError):
    """What was given cannot work; the message says what is needed and which key to change."""


class ConversionError(ValueError):
    """A file or folder that cannot be converted as asked. Nothing has been written."""
