"""One row of a table of results: a figure with all that is needed to judge it."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class MetricRow:
    """One measured value, from `n` prompts of one seed, beside what chance and a perfect model
    would give."""

    group: str
    name: str
    value: float
    unit: str
    n: int
    seed: int
    chance: float | None = None
    """What a guess, or a shuffled control, gives."""
    ceiling: float | None = None
    """What the evaluator says of the true images."""
    threshold: float | None = None
    direction: str = ">="

    @property
    def passed(self) -> bool | None:
        """Whether the threshold is met; None without one."""
        if self.threshold is None:
            return None
        if self.direction == ">=":
            return self.value >= self.threshold
        return self.value <= self.threshold

    def to_json(self) -> dict[str, object]:
        """All fields and `passed`, as plain values."""
        return {**asdict(self), "passed": self.passed}
