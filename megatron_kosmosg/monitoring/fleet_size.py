"""What metrics.jsonl says of score ranks: how many a run needs, and which hardware answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_FEWEST_ITERATIONS = 5
_KEPT_IDLE = 0.1
"""Of score ranks: they have to be a little faster than the decoder, or it waits in turns."""
_WAITS = 0.05
"""Share of an iteration that decoder ranks may wait."""
ANSWERS = "score_answers/"
"""Before the kind of hardware in the name of a number of metrics.jsonl."""


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


def answers_in(record: Mapping[str, Any]) -> dict[str, int]:
    """{kind: answers} of a line of metrics.jsonl."""
    return {
        name.removeprefix(ANSWERS): int(value)
        for name, value in record.items()
        if name.startswith(ANSWERS) and _is_number(value)
    }


def hardware_in_words(answers: Mapping[str, int]) -> str:
    """{kind: answers} as "480 (94%) from NVIDIA H100, 32 (6%) from NVIDIA L40S"."""
    total = max(1, sum(answers.values()))
    ordered = sorted(answers.items(), key=lambda item: -item[1])
    return ", ".join(f"{count:,} ({count / total:.0%}) from {kind}" for kind, count in ordered)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
