"""`python -m quickstart`: arguments, checks, the run, the verdict. Started by quickstart.sh.

Exit codes: 0 done; 1 a step failed; 2 wrong arguments; 3 a quality threshold is missed;
130 interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from quickstart.progress import clock
from quickstart.runner import Interrupted, Runner, StepFailed
from quickstart.steps import plan
from quickstart.verdict import missed, read_rows, table

REPOSITORY = Path(__file__).resolve().parents[2]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="examples/quickstart.sh")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "quickstart")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    if arguments.fresh:
        shutil.rmtree(out / "steps", ignore_errors=True)
    steps = plan(REPOSITORY, out, fast=arguments.fast, ablations=arguments.ablations)
    mode = "fast" if arguments.fast else "full"
    print(
        f"{len(steps)} steps into {out}, about {clock(sum(step.seconds for step in steps))} "
        "on two quiet cores. Ctrl-C is safe: the same command continues.",
        flush=True,
    )
    try:
        Runner(steps, out, REPOSITORY, mode).run()
    except Interrupted as error:
        print(f"\nInterrupted during '{error}'. The same command continues from there.")
        return 130
    except StepFailed as error:
        print(f"\n{error}\nAfter the cause is mended, the same command continues.", file=sys.stderr)
        return 1
    rows = read_rows(out / "evaluation" / "metrics.json")
    print(f"\n{table(rows)}\n\nPage: {out / 'report.html'}")
    failures = missed(rows)
    if arguments.fast:
        print("--fast shows that every step works; its pictures are not meant to be good.")
        return 0
    for name in failures:
        print(f"threshold missed: {name}", file=sys.stderr)
    return 3 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
