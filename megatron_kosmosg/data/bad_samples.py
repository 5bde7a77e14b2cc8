"""Counts undecodable pictures of this rank, reports each, and stops the run past the limit."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger(__name__)


class TooManyBadSamples(ValueError):
    """More pictures were undecodable than data.max_bad_samples allows."""


class BadSampleCounter:
    """Thread-safe count with a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self.count = 0

    def report(self, dataset: str, key: str, position: int, reason: str) -> None:
        """Counts one bad picture. Raises TooManyBadSamples beyond the limit."""
        with self._lock:
            self.count += 1
            count = self.count
        logger.warning(
            "dataset %s, sample %s, stream position %d: bad image replaced (%d so far): %s",
            *(dataset, key, position, count, reason),
        )
        if count > self._limit:
            raise TooManyBadSamples(
                f"{count} undecodable images, data.max_bad_samples allows {self._limit}; the last "
                f"is sample {key} of dataset {dataset}: {reason}"
            )
