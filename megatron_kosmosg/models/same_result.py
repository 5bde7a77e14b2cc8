"""Whether a faster way to compute gives what the plain way gives, tried before it is used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

LARGEST_ERROR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of an output and of a gradient, as a share of the plain one's length: rounding in each dtype."""

Pass = TypeVar("Pass", bound=Callable[..., torch.Tensor])


def tried(
    what: str,
    build: Callable[[], Pass],
    results: Callable[[Pass], list[torch.Tensor]],
    expected: list[torch.Tensor],
    dtype: torch.dtype,
) -> Pass | None:
    """The pass that `build` gives, where its results, [output, gradient], are those wanted; None,
    said in one line, where they are not, or where it cannot be built or run here.

    Args:
        dtype: the type that it computes in.
    """
    try:
        faster = build()
        found = results(faster)
    except Exception as error:  # compilers and kernels raise what they like
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        logger.warning("%s stays as it is, for it cannot run so here: %s", what, reason)
        return None
    largest = LARGEST_ERROR[dtype]
    for name, result, plain in zip(("output", "gradient"), found, expected, strict=False):
        error = relative_error(result, plain)
        if not error <= largest:  # also when it is not a number
            logger.warning(
                "%s stays as it is, for its %s would be off by %.1f %% (%.1f %% is rounding)",
                what, name, 100 * error, 100 * largest,
            )  # fmt: skip
            return None
    logger.info("%s runs so", what)
    return faster


def relative_error(found: torch.Tensor, plain: torch.Tensor) -> float:
    """Length of the difference as a share of the plain one's length."""
    return float((found.float() - plain.float()).norm() / plain.float().norm())


def fixed_normal(shape: tuple[int, ...]) -> torch.Tensor:
    """Normally distributed numbers that are the same in every process and drawn from no generator
    of the run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
