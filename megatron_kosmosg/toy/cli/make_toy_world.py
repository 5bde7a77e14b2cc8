"""Writes the toy world as ordinary files: OUTPUT/{train,heldout}/KIND.jsonl and their images."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_seed,
    command_parser,
    file_path,
    positive_int,
    run_command,
)

EPILOG = """\
KIND is text, caption, interleaved, compositional or edit; `kosmosg preprocess --help` shows their
fields. The same size and seed give the same files. A finished world of that size and seed is left
as it is; another one in the same folder is replaced when the new one is complete.
"""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("toy make-world", __doc__, EPILOG)
    parser.add_argument(
        "--output", type=file_path, required=True, metavar="FOLDER", help="folder to write"
    )
    parser.add_argument(
        "--size", type=positive_int, default=4000, metavar="N", help="scenes (4000)"
    )
    add_seed(parser, "decides all draws")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when the world is there, and 2, with a message on stderr, when it could not be
    written."""
    args = build_parser().parse_args(arguments)
    return run_command(
        lambda: _make(args), "interrupted; the same command begins it anew", "--output"
    )


def _make(args: argparse.Namespace) -> int:
    import torch

    from megatron_kosmosg.progress import Progress
    from megatron_kosmosg.toy.world_files import World, is_complete, write_world

    torch.set_num_threads(1)
    started = time.monotonic()
    world = World(args.size, args.seed)
    if is_complete(args.output, world):
        print(f"{args.output}: complete, left as it is")
        return exit_codes.DONE
    with Progress("", "record") as progress:
        write_world(args.output, world, progress)
    print(f"{args.output}: {args.size} scenes, {time.monotonic() - started:.1f} s")
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
