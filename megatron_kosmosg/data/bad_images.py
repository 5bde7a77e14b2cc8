"""What happens to images that cannot be decoded: each is reported, too many end the run.

Streams put their number into every batch, so that the count is a function of the samples trained
on, the same on every layout and after every restart.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class TooManyBadImages(ValueError):
    """More images were undecodable than data.max_bad_images allows."""


def report_bad_image(
    dataset: str, key: str, position: int, reason: str, action: str = "replaced"
) -> None:
    """Names one bad image in the log, and what became of its sample."""
    logger.warning(
        "dataset %s, sample %s, stream position %d: bad image %s: %s",
        *(dataset, key, position, action, reason),
    )


def check_bad_images(count: int, limit: int) -> None:
    """Raises TooManyBadImages when `count` bad images are more than data.max_bad_images."""
    if count > limit:
        raise TooManyBadImages(
            f"{count} undecodable images so far, data.max_bad_images allows {limit}; the log "
            "names the dataset and sample of each ('bad image')"
        )
