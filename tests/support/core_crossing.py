"""Goes on with the runs of all stages in one process, as any Python with this package's needs can.

usage: python -m tests.support.core_crossing WORK ITERATIONS

WORK is what the archives of tests/fixtures unpack to; each run in it is taken to ITERATIONS. The
test of crossing from one Megatron-Core to another starts this with two Pythons in turn.
"""

from __future__ import annotations

import os
import sys

from megatron_kosmosg import train
from tests.support.ranks import free_port

STAGES = ("pretrain", "align", "instruct")


def main(work: str, iterations: str) -> int:
    """0, or the exit code of the first stage that fails."""
    os.chdir(work)
    for stage in STAGES:
        os.environ["MASTER_PORT"] = str(free_port())
        code = train.main(["--config", f"{stage}.yaml", f"training.train_iters={iterations}"])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
