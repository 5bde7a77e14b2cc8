"""Seeds of long counts, which try something else each time."""

from __future__ import annotations

import os
import random


def moment_seed(fixed: int | None = None) -> int:
    """A seed of the moment, or `fixed` where one is given; KOSMOSG_FAULT_SEED repeats a printed
    one. It is printed, so that pytest shows it beside a failure."""
    drawn = random.SystemRandom().randrange(10**6) if fixed is None else fixed
    seed = int(os.environ.get("KOSMOSG_FAULT_SEED") or drawn)
    print(f"KOSMOSG_FAULT_SEED={seed}")
    return seed
