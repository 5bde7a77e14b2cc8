"""What the toy run has to show (three stages), as rows of figures and grids of images.

Every figure is on held-out combinations and stands beside the evaluator's ceiling (the true images)
and a shuffled control (each image judged against the next prompt's truth).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from megatron_kosmosg.toy.evaluation.metric_row import MetricRow
from megatron_kosmosg.toy.evaluation.scene_reader import EntityComparison, SceneComparison
from megatron_kosmosg.toy.evaluation.toy_generation import GeneratedScenes, true_images
from megatron_kosmosg.toy.world import Scene

Measure = Callable[[Sequence[SceneComparison]], float]


def share(choose: Callable[[EntityComparison], bool]) -> Measure:
    """Share of entities for which `choose(entity comparison)` holds."""

    def measure(comparisons: Sequence[SceneComparison]) -> float:
        found = [choose(entity) for comparison in comparisons for entity in comparison.entities]
        return sum(found) / len(found)

    return measure


def hue(average: Callable[[Sequence[float]], float]) -> Measure:
    """Average error of the first hue in degrees over entities."""

    def measure(comparisons: Sequence[SceneComparison]) -> float:
        return average([entity.hue_error_deg for v in comparisons for entity in v.entities])

    return measure


def background_word(comparisons: Sequence[SceneComparison]) -> float:
    """Share of images whose background has the right coarse colour."""
    return sum(comparison.background_word_correct for comparison in comparisons) / len(comparisons)


def background_hue(comparisons: Sequence[SceneComparison]) -> float:
    """Median error of the background's hue in degrees."""
    return statistics.median(comparison.background_hue_error for comparison in comparisons)


def all_as_requested(comparisons: Sequence[SceneComparison]) -> float:
    """Share of images in which every entity and the background are right."""
    right = [
        v.background_word_correct and all(e.all_correct for e in v.entities) for v in comparisons
    ]
    return sum(right) / len(right)


SHAPE = share(lambda entity: entity.shape_correct)
PATTERN = share(lambda entity: entity.pattern_correct)
ALL = share(lambda entity: entity.all_correct)
HUE_MEDIAN = hue(statistics.median)
HUE_MEAN = hue(statistics.fmean)


class Cell:
    """Images drawn for one kind of prompt, with the truths they are compared with."""

    def __init__(
        self, group: str, title: str, drawn: GeneratedScenes, truths: Sequence[Scene], seed: int
    ):
        self.group, self.title, self.drawn = group, title, drawn
        self._truths, self._seed = list(truths), seed
        self._comparisons = drawn.comparisons(self._truths)
        self._shuffled = drawn.comparisons(self._truths[1:] + self._truths[:1])
        truth = true_images(self._truths)
        self.true_images = truth.images
        self._ceiling = truth.comparisons(self._truths)

    def value(self, measure: Measure) -> float:
        """The value of a measure on this cell alone."""
        return measure(self._comparisons)

    def row(
        self,
        name: str,
        measure: Measure,
        unit: str,
        threshold: float | None = None,
        direction: str = ">=",
    ) -> MetricRow:
        """The measure beside its control and its ceiling."""
        return MetricRow(
            group=self.group,
            name=f"{self.title}: {name}",
            value=measure(self._comparisons),
            unit=unit,
            n=len(self._truths),
            seed=self._seed,
            chance=measure(self._shuffled),
            ceiling=measure(self._ceiling),
            threshold=threshold,
            direction=direction,
        )
