"""The error of every conversion: what was found, what is needed and the way out, for users."""

from __future__ import annotations


class ConversionError(ValueError):
    """A file or folder that cannot be converted as asked. Nothing has been written."""
