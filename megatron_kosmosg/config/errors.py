"""The errors that say what a user gave, what is needed and the way out."""

from __future__ import annotations


class InputError(ValueError):
    """Arguments, settings or files that cannot be used, found before or while they are read.

    Training ends with exit code 2 for these alone (exit_codes.BAD_INPUT): job scripts do not start
    it again. Any other ValueError is a failure on the way.
    """


class ConfigError(InputError):
    """What was given cannot work; the message says what is needed and which key to change."""


class ConversionError(InputError):
    """A file or folder that cannot be converted as asked. Nothing has been written."""
