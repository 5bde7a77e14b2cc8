"""Why the best layout of a search wins: what the best one with another value of a setting loses."""

from __future__ import annotations

from dataclasses import asdict

from megatron_kosmosg.planning.memory import GIB
from megatron_kosmosg.planning.search import Candidate, SearchResult

_QUESTIONS = {
    "tensor parallel": lambda c: str(c.tensor),
    "pipeline parallel": lambda c: str(c.pipeline),
    "score ranks": lambda c: c.score,
    "micro-batch": lambda c: str(c.micro_batch_size),
    "latents": lambda c: "cached" if c.cached_latents else "encoded online",
    "recompute": lambda c: f"{c.recompute}{', U-Net too' if c.score_recompute else ''}",
}


def reasons(result: SearchResult) -> list[str]:
    """For each setting, how the best layout with another value compares, and what it loses to."""
    best, lines = result.candidates[0], []
    for question, answer in _QUESTIONS.items():
        mine = answer(best.choice)
        others: dict[str, Candidate] = {}
        for candidate in result.candidates:
            others.setdefault(answer(candidate.choice), candidate)
        compared = [
            f"{value}: {_loss(best, other)}" for value, other in others.items() if value != mine
        ]
        if compared:
            lines.append(f"{question} {mine}; " + "; ".join(compared))
    tightest = max(best.estimate.kinds, key=lambda kind: kind.memory.total)
    lines.append(
        f"memory: {tightest.memory.total / GIB:.1f} GiB on {tightest.name} ranks; "
        f"{result.num_too_large} of {result.num_tried} layouts do not fit"
    )
    return lines


def _loss(best: Candidate, other: Candidate) -> str:
    slower = other.estimate.seconds / best.estimate.seconds - 1
    grown = {
        name: seconds - best.estimate.parts[name] for name, seconds in other.estimate.parts.items()
    }
    name = max(grown, key=grown.__getitem__)
    if slower < 0.001:
        return "equal"
    return f"{slower:+.0%} time, mostly {name} ({grown[name] * 1e3:+.0f} ms)"


def as_dict(candidate: Candidate) -> dict:
    """What the JSON says of one candidate."""
    planned = candidate.estimate
    return asdict(candidate.choice) | {
        "seconds": planned.seconds,
        "images_per_second": candidate.config.training.global_batch_size / planned.seconds,
        "decoder_idle": planned.decoder_idle,
        "score_idle": planned.score_idle,
        "largest_memory_gib": max(kind.memory.total for kind in planned.kinds) / GIB,
    }
