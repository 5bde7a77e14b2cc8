"""The one error type for settings a user can change."""

from __future__ import annotations


class ConfigError(ValueError):
    """What was given cannot work; the message says what is needed and which key to change."""
