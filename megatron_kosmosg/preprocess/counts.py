"""How many records were taken, left out and why, added up over shards, and the table that a run
ends with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

NUM_REASONS = 4
"""Reasons in the last line; the table above it and the rejects file have all."""


@dataclass(frozen=True)
class Counts:
    """How many records were taken and left out, and for which reasons."""

    samples: int = 0
    tokens: int = 0
    images: int = 0
    output_bytes: int = 0
    """Bytes of the images and tokens that were written."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Parts that samples which were kept lack, such as "images: image is truncated"."""
    notes: Counter[str] = field(default_factory=Counter)
    """What else users should know of the records, see Record.note."""
    verified: int = 0
    """Images that were checked."""
    verify_seconds: float = 0.0
    """CPU time of the checks, added over workers."""
    work_seconds: float = 0.0
    """CPU time of all the work on shards, added over workers."""

    def __add__(self, other: Counts) -> Counts:
        left, right = vars(self), vars(other)
        return Counts(**{name: left[name] + right[name] for name in left})

    @staticmethod
    def of(stored: dict[str, Any]) -> Counts:
        """The counts whose fields were stored as JSON."""
        names = ("rejects", "left_out", "notes")
        reasons: dict[str, Any] = {name: Counter(stored[name]) for name in names}
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
    for what, reasons in _by_part(counts.left_out).items():
        rows += [(f"{what} left out", reasons.total()), *_by_reason(reasons)]
    rows += sorted(counts.notes.items())
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {number:>15,}" for name, number in rows)


def rates(counts: Counts, seconds: float) -> str:
    """What came of the records in so many seconds, in part of a line."""
    per_second = 1 / max(seconds, 1e-9)
    return (
        f"{counts.samples:,} samples, {counts.samples * per_second:,.0f}/s, "
        f"{counts.output_bytes * per_second / 1e6:.1f} MB/s, {counts.rejects.total():,} rejected"
    )


def last_line(counts: Counts) -> str:
    """What was taken, left out and lost from what was kept, with the reasons."""
    parts = [f"{counts.samples:,} taken", reasons_text("rejected", counts.rejects)]
    parts += [reasons_text(f"{what} left out", r) for what, r in _by_part(counts.left_out).items()]
    return ", ".join(parts)


def reasons_text(what: str, reasons: Counter[str]) -> str:
    """A number of things left out, and the most frequent reasons, in words."""
    named = [f"{reason} {number:,}" for reason, number in reasons.most_common(NUM_REASONS)]
    named += ["..."] if len(reasons) > NUM_REASONS else []
    return f"{reasons.total():,} {what}" + (f" ({', '.join(named)})" if named else "")


def verification(counts: Counts) -> str:
    """One line on what checking the images took."""
    share = 100 * counts.verify_seconds / max(counts.work_seconds, 1e-9)
    rate = counts.verified / max(counts.verify_seconds, 1e-9)
    return (
        f"{counts.verified:,} images checked in {counts.verify_seconds:.1f} s of CPU time "
        f"({rate:,.0f}/s, {share:.0f} % of the work)"
    )


def _by_part(left_out: Counter[str]) -> dict[str, Counter[str]]:
    """The reasons of {"images: image is truncated": n} apart by what they are of: {"images":
    {"image is truncated": n}}."""
    parts: dict[str, Counter[str]] = {}
    for name, number in sorted(left_out.items()):
        what, _, reason = name.partition(": ")
        parts.setdefault(what, Counter())[reason] += number
    return parts


def _by_reason(reasons: Counter[str]) -> list[tuple[str, int]]:
    return [(f"  {reason}", number) for reason, number in sorted(reasons.items())]
