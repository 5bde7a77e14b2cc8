"""metrics.jsonl of a stage as series over iterations, sorted into what a chart shows together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmosg.foreign_files import parse_json, read_file

_PROGRESS = {"iteration", "consumed_train_samples"}
_SPEED = {"samples_per_sec", "tokens_per_sec", "tflops", "mfu", "data_wait", "padding"}
_OPTIMIZER = {"lr", "grad_norm"}
_HELD_OUT = "heldout_"

Points = tuple[list[int], list[float]]
"""Iterations and the values at them."""


@dataclass(frozen=True)
class History:
    """Series by name. A value that is absent or not finite at an iteration leaves no point."""

    series: dict[str, Points]
    last_iteration: int

    def losses(self) -> list[str]:
        """The names of the losses: `loss` first, then its parts."""
        return sorted(
            (n for n in self._measures() if n.endswith("loss")), key=lambda n: n != "loss"
        )

    def others(self) -> list[str]:
        """Measures that are not losses, such as a cosine; some exist on held-out data only."""
        return [name for name in self._measures() if not name.endswith("loss")]

    def held_out(self, name: str) -> Points | None:
        """The same measure on held-out data; None where it was not taken."""
        return self.series.get(_HELD_OUT + name)

    def median(self, name: str) -> float | None:
        """Median over the iterations, None when the series is missing."""
        if name not in self.series:
            return None
        values = sorted(self.series[name][1])
        return values[len(values) // 2]

    def _measures(self) -> list[str]:
        known = _PROGRESS | _SPEED | _OPTIMIZER
        names = dict.fromkeys(n.removeprefix(_HELD_OUT) for n in self.series if n not in known)
        return list(names)


def read_history(metrics: Path) -> History:
    """History of one metrics.jsonl. An iteration that was repeated after a restart counts once,
    as it went the last time; a half-written last line is left out."""
    records: dict[int, dict] = {}
    for line in read_file(metrics).decode("utf-8", "replace").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or type(record.get("iteration")) is not int:
            continue
        records[record["iteration"]] = records.get(record["iteration"], {}) | record
    series: dict[str, Points] = {}
    for iteration in sorted(records):
        for name, value in records[iteration].items():
            if name in _PROGRESS or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                iterations, values = series.setdefault(name, ([], []))
                iterations.append(iteration)
                values.append(float(value))
    return History(series, max(records, default=0))


def smooth(values: list[float], span: int) -> list[float]:
    """Mean of the up to `span` values around each one. The window shrinks towards the start, where
    training moves fast, and is cut off at the end."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    result = []
    for i in range(len(values)):
        reach = min(span // 2, i)
        first, end = i - reach, min(i + reach + 1, len(values))
        result.append((sums[end] - sums[first]) / (end - first))
    return result
