"""`python -m quickstart`: arguments, checks, the run, the thresholds. Started by quickstart.sh.

Exit codes: 0 done; 1 a step failed; 2 wrong arguments; 3 a quality threshold is missed;
130 interrupted, the same command continues.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import CommandParser, file_path, seed
from quickstart.progress import clock
from quickstart.runner import Interrupted, Runner, StepFailed
from quickstart.steps import plan
from quickstart.thresholds import missed, read_rows, table

REPOSITORY = Path(__file__).resolve().parents[2]


def build_parser() -> CommandParser:
    """What quickstart.sh passes on; its --help says more."""
    parser = CommandParser(prog="examples/quickstart.sh")
    parser.add_argument(
        "--output",
        type=file_path,
        default=REPOSITORY / "runs" / "quickstart",
        metavar="FOLDER",
        help="for everything that is made (runs/quickstart)",
    )
    parser.renamed("--out", "--output")
    parser.add_argument("--fast", action="store_true", help="few iterations, no thresholds")
    parser.add_argument("--ablations", action="store_true", help="variants of the paper's Table 2")
    parser.add_argument(
        "--seed",
        type=seed,
        metavar="N",
        help="of the initial weights, order and noise of all trainings (that of the configs, 0)",
    )
    parser.add_argument("--fresh", action="store_true", help="repeat what is done")
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    out = arguments.output.resolve()
    if arguments.fresh:
        shutil.rmtree(out / "steps", ignore_errors=True)
    steps = plan(
        REPOSITORY, out, fast=arguments.fast, ablations=arguments.ablations, seed=arguments.seed
    )
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
        return exit_codes.INTERRUPTED
    except StepFailed as error:
        print(f"\n{error}\nAfter the cause is mended, the same command continues.", file=sys.stderr)
        return exit_codes.FAILURE
    rows = read_rows(out / "evaluation" / "metrics.json")
    print(f"\n{table(rows)}\n\nPage: {out / 'report.html'}")
    failures = missed(rows)
    if arguments.fast:
        print("--fast shows that every step works; its images are not meant to be good.")
        return exit_codes.DONE
    for name in failures:
        print(f"threshold missed: {name}", file=sys.stderr)
    return exit_codes.MISSED if failures else exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
