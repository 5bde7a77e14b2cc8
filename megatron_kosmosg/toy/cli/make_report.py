"""Writes FOLDER/report.html, one self-contained page, from a quickstart's output folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import CommandParser, command_parser, file_path, run_command


def build_parser() -> CommandParser:
    """The parser of the command and its option."""
    parser = command_parser("toy make-report", __doc__)
    parser.add_argument(
        "--output", type=file_path, required=True, metavar="FOLDER", help="folder of the quickstart"
    )
    parser.renamed("--out", "--output")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when the page is written, and 2, with a message on stderr, when the folder has not
    what it needs."""
    args = build_parser().parse_args(arguments)
    return run_command(lambda: _report(args), writes="--output")


def _report(args: argparse.Namespace) -> int:
    from megatron_kosmosg.toy.report.report_page import write_report

    print(write_report(args.output))
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
