"""One file for each kind of sample that a store may hold, and the table of them.

A new kind is a file with its object (kind.SampleKind) and a line in the table.
"""

from __future__ import annotations

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.kinds.caption import CAPTION
from megatron_kosmosg.data.kinds.compositional import COMPOSITIONAL
from megatron_kosmosg.data.kinds.edit import EDIT
from megatron_kosmosg.data.kinds.interleaved import INTERLEAVED
from megatron_kosmosg.data.kinds.kind import SampleKind
from megatron_kosmosg.data.kinds.text import TEXT

KINDS: dict[str, SampleKind] = {
    kind.name: kind for kind in (TEXT, CAPTION, INTERLEAVED, EDIT, COMPOSITIONAL)
}
"""By name."""


def find_kind(name: str) -> SampleKind:
    """The kind called `name`. Raises ValueError for one that is not in the table."""
    if name not in KINDS:
        raise InputError(f"kind {name} is not known; the kinds are {', '.join(KINDS)}")
    return KINDS[name]


def read_by(stage: str) -> list[SampleKind]:
    """The kinds that `stage` reads."""
    return [kind for kind in KINDS.values() if kind.use(stage) is not None]


def names_read_by(stage: str) -> str:
    """The names of the kinds that `stage` reads, for messages."""
    return ", ".join(kind.name for kind in read_by(stage))
