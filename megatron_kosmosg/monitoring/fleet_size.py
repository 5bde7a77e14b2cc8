"""The number of score ranks that a run needs, by what its decoder and score ranks measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_FEWEST_ITERATIONS = 5
_KEPT_IDLE = 0.1
"""Of score ranks: they have to be a little faster than the decoder, or it waits in turns."""
_WAITS = 0.05
"""Share of an iteration that decoder ranks may wait."""


def size_advice(iterations: Sequence[Mapping[str, Any]]) -> str | None:
    """What to do about the number of score ranks; None for too few iterations, without score ranks
    and where nothing was measured.

    Args:
        iterations: the latest lines of metrics.jsonl, of one start.
    """
    names = ("decoder_idle", "score_idle", "score_ranks")
    known = [line for line in iterations if all(_is_number(line.get(name)) for name in names)]
    known = [line for line in known if line["score_ranks"] >= 1]
    if len(known) < _FEWEST_ITERATIONS:
        return None
    waits, idle, ranks = (sum(line[name] for line in known) / len(known) for name in names)
    # What the U-Net has to do in an iteration, over what the decoder itself needs for one.
    work = ranks * (1 - idle) / max(1e-6, 1 - waits)
    needed = max(1, math.ceil(work / (1 - _KEPT_IDLE) - 1e-6))
    measured = f"decoder ranks wait {waits:.0%} of the time, score ranks {idle:.0%}"
    now = round(ranks)
    if waits > _WAITS and needed > now:
        return f"{measured}: {needed} score ranks instead of {now} would keep up"
    if waits > _WAITS:
        return f"{measured}: {now} score ranks suffice, a wider score.window overlaps more"
    if needed < now:
        return f"{measured}: {needed} of the {now} score ranks would do"
    return f"{measured}: {now} score ranks fit"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
