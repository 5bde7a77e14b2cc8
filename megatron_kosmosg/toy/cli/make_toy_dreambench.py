"""Writes a DreamBench of toy shapes, with networks of random weights to score them with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_seed,
    command_parser,
    file_path,
    run_command,
)

EPILOG = """\
OUTPUT/dreambooth has the folders and names of google/dreambooth with one toy shape each;
OUTPUT/dino.pth and OUTPUT/clip have the published forms and random weights. With them
  kosmosg evaluate dreambench --model exported --dreambooth OUTPUT/dreambooth \\
      --dino OUTPUT/dino.pth --clip OUTPUT/clip --output judged
goes all the way without a download; its scores mean nothing. A finished folder of that seed is left
as it is.
"""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("toy make-dreambench", __doc__, EPILOG)
    parser.add_argument(
        "--output", type=file_path, required=True, metavar="FOLDER", help="folder to write"
    )
    add_seed(parser, "decides the shapes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when the folder is there, and 2, with a message on stderr, when it could not be
    written."""
    args = build_parser().parse_args(arguments)
    return run_command(
        lambda: _make(args), "interrupted; the same command begins it anew", "--output"
    )


def _make(args: argparse.Namespace) -> int:
    from megatron_kosmosg.toy.toy_dreambench import ToyDreamBench, is_complete, write_dreambench

    bench = ToyDreamBench(args.seed)
    if is_complete(args.output, bench):
        print(f"{args.output}: complete, left as it is")
        return exit_codes.DONE
    write_dreambench(args.output, bench)
    print(f"{args.output}: 30 subjects, a DINO and a CLIP of random weights")
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
