"""A layout beside the others of a search: those that are much faster, or why the best one wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_kosmosg.config.load import config_differences
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.planning.estimate import Estimate
from megatron_kosmosg.planning.memory import GIB
from megatron_kosmosg.planning.search import Candidate, SearchResult
from megatron_kosmosg.stages import stage_facts

_QUESTIONS = {
    "tensor parallel": lambda c: str(c.tensor),
    "pipeline parallel": lambda c: str(c.pipeline),
    "score ranks": lambda c: c.score,
    "micro-batch": lambda c: str(c.micro_batch_size),
    "latents": lambda c: "cached" if c.cached_latents else "encoded online",
    "recompute": lambda c: f"{c.recompute}{', U-Net too' if c.score_recompute else ''}",
}


WORTH_SAYING = 1.1
"""How much faster a layout must be to be mentioned."""


@dataclass(frozen=True)
class Faster:
    """A layout that is planned faster than the given one."""

    layout: str
    times: float
    """Its speed as a multiple of the given layout's."""
    samples_per_second: float
    settings: list[str]
    """Those in which it differs, for the command line."""


def faster_layouts(
    config: RunConfig, planned: Estimate, candidates: Sequence[Candidate]
) -> list[Faster]:
    """The best of a search, the best that reads the same targets as `config` (cached latents or
    images), and the best with the same placement of the U-Net; only what is much faster.

    Args:
        candidates: those that fit, fastest first.
    """
    cached = config.data.latent_cache is not None
    first = [
        next(iter(candidates)),
        next((c for c in candidates if c.choice.cached_latents == cached), None),
        next((c for c in candidates if c.choice.placement == config.score.placement), None),
    ]
    found: list[Faster] = []
    for candidate in first:
        if candidate is None:
            continue
        faster = beside(config, planned, candidate)
        if faster.times > WORTH_SAYING and faster.layout not in [f.layout for f in found]:
            found.append(faster)
    return found


def beside(config: RunConfig, planned: Estimate, candidate: Candidate) -> Faster:
    """A candidate, which may have another batch, beside the plan of `config`."""
    speed = config.training.global_batch_size / planned.seconds
    batch = candidate.config.training.global_batch_size
    layout = in_words(candidate)
    if batch != config.training.global_batch_size:
        layout = f"{batch:,} samples an update: {layout}"
    settings = [
        f"{key}={_as_setting(new)}"
        for key, (_, new) in config_differences(config, candidate.config).items()
        if not (key.startswith("score.") and _is_idle(key, candidate))
    ]
    times = candidate.samples_per_second / speed
    return Faster(layout, times, candidate.samples_per_second, settings)


def _is_idle(key: str, candidate: Candidate) -> bool:
    """Whether a setting of the score ranks means nothing, as there are none."""
    names = ("score.ranks_per_replica", "score.replicas_per_rank", "score.window")
    return candidate.choice.placement == "colocated" and key in names


def _as_setting(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def in_words(candidate: Candidate) -> str:
    """The layout of a candidate in one line."""
    choice, planned = candidate.choice, candidate.estimate
    words = [
        f"TP{choice.tensor} PP{choice.pipeline} DP{planned.world.num_replicas}",
        f"micro-batch {choice.micro_batch_size}",
    ]
    if stage_facts(candidate.config.stage).has_unet:
        window = f" (window {choice.window})" if planned.world.score_ranks_per_unit else ""
        latents = "cached" if choice.cached_latents else "online"
        words += [choice.score + window, f"latents {latents}"]
    words.append(f"recompute {choice.recompute}{' + U-Net' if choice.score_recompute else ''}")
    words.append(f"{candidate.largest_memory_gib:.0f} GiB")
    if choice.pipeline_layout:
        words.append(choice.pipeline_layout)
    return ", ".join(words)


def reasons(result: SearchResult) -> list[str]:
    """For each setting a line that says how the best layout with another value compares, and what
    it loses to."""
    best, lines = result.candidates[0], []
    for question, answer in _QUESTIONS.items():
        chosen = answer(best.choice)
        others: dict[str, Candidate] = {}
        for candidate in result.candidates:
            others.setdefault(answer(candidate.choice), candidate)
        compared = [
            f"{value}: {_loss(best, other)}" for value, other in others.items() if value != chosen
        ]
        if compared:
            lines.append(f"{question} {chosen}; " + "; ".join(compared))
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
    """One candidate as the JSON states it."""
    planned = candidate.estimate
    return asdict(candidate.choice) | {
        "seconds": planned.seconds,
        "images_per_second": candidate.samples_per_second,
        "decoder_idle": planned.decoder_idle,
        "score_idle": planned.score_idle,
        "largest_memory_gib": candidate.largest_memory_gib,
    }
