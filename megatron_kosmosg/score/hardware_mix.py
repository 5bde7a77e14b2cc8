"""Which kinds of hardware answered: score ranks of unlike kinds round differently."""

from __future__ import annotations

import re
from collections import Counter

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.monitoring.fleet_size import ANSWERS, answers_in, hardware_in_words
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.score.connect import answers_by_hardware

_LONGEST = 100


class HardwareMix:
    """Counts the answers of an interval by the hardware that gave them, on the rank that writes."""

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        """Begins with no answers."""
        self._config, self._context = config, context
        self._before: Counter[str] = Counter()
        self._said: set[str] = set()

    def report(self, iteration: int) -> dict[str, float]:
        """Every `logging.log_interval` iterations, and after the last one, answers to the replicas
        since the report before, by kind: {"score_answers/NVIDIA L40S torch 2.9.1 bf16": 12}; else
        empty, as without score ranks."""
        is_last = iteration == self._config.training.train_iters
        is_due = is_last or iteration % self._config.logging.log_interval == 0
        if not self._context.num_score_ranks or not is_due:
            return {}
        now = answers_by_hardware(self._config, self._context)
        since, self._before = now - self._before, now
        return {ANSWERS + _tracked(kind): float(count) for kind, count in since.items()}

    def news(self, record: dict[str, float | None]) -> str | None:
        """What to say of an interval in which several kinds answered; None where that is known
        already, and for one kind."""
        answers = answers_in(record)
        if len(answers) < 2 or answers.keys() == self._said:
            return None
        self._said = set(answers)
        return f"answers of unlike kinds, which round differently: {hardware_in_words(answers)}"


def _tracked(kind: str) -> str:
    """A name that every tracker takes: MLflow's may have letters, digits, and _-./ or spaces."""
    return re.sub(r"[^A-Za-z0-9_. -]", "-", kind.replace(",", ""))[:_LONGEST]
