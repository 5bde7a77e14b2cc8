"""The nearest numbers that divide, for messages that refuse one that does not."""

from __future__ import annotations


def divisors(value: int) -> list[int]:
    """All numbers that divide a positive number, ascending."""
    return [number for number in range(1, value + 1) if value % number == 0]


def neighbours(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, as words: `24 or 32`; the lower one unless 0."""
    lower = value // unit * unit
    return f"{lower} or {lower + unit}" if lower else f"{unit}"
