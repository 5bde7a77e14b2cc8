"""What came of some records, added up over shards, and the table that a run ends with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Counts:
    """What came of some records."""

    samples: int = 0
    tokens: int = 0
    images: int = 0
    output_bytes: int = 0
    """Bytes of the pictures and tokens that were written."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Pictures left out of documents that were kept, by reason."""
    verified: int = 0
    """Pictures that were checked."""
    verify_seconds: float = 0.0
    """CPU time of the checks, added over workers."""
    work_seconds: float = 0.0
    """CPU time of all the work on shards, added over workers."""

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = vars(self), vars(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})

    @staticmethod
    def of(stored: dict[str, Any]) -> Counts:
        """Of the fields as they come from JSON."""
        reasons: dict[str, Any] = {name: Counter(stored[name]) for name in ("rejects", "left_out")}
        return Counts(**(stored | reasons))


def summary(counts: Counts) -> str:
    """A small table of what was kept and what was left out, by reason."""
    rows = [
        ("samples", counts.samples),
        ("text tokens", counts.tokens),
        ("images", counts.images),
        ("bytes written", counts.output_bytes),
        ("rejected", counts.rejects.total()),
        *_by_reason(counts.rejects),
    ]
    if counts.left_out:
        rows += [("pictures left out", counts.left_out.total()), *_by_reason(counts.left_out)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {number:>15,}" for name, number in rows)


def rates(counts: Counts, seconds: float) -> str:
    """What came of the records in so many seconds, in part of a line."""
    per_second = 1 / max(seconds, 1e-9)
    return (
        f"{counts.samples:,} samples, {counts.samples * per_second:,.0f}/s, "
        f"{counts.output_bytes * per_second / 1e6:.1f} MB/s, {counts.rejects.total():,} rejected"
    )


def verification(counts: Counts) -> str:
    """One line on what checking the pictures took."""
    share = 100 * counts.verify_seconds / max(counts.work_seconds, 1e-9)
    rate = counts.verified / max(counts.verify_seconds, 1e-9)
    return (
        f"{counts.verified:,} pictures checked in {counts.verify_seconds:.1f} s of CPU time "
        f"({rate:,.0f}/s, {share:.0f} % of the work)"
    )


def _by_reason(reasons: Counter[str]) -> list[tuple[str, int]]:
    return [(f"  {reason}", number) for reason, number in sorted(reasons.items())]
