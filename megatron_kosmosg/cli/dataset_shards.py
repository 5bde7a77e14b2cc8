"""One dataset of many shards, on any file systems: lists them, adds some, checks each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import CommandParser, command_parser, run_command, some_text
from megatron_kosmosg.terminal_text import printable

VERIFY = ("size", "blocks", "whole")
EPILOG = """\
A shard is a finished dataset of `kosmosg preprocess`. PREFIX.json lists them, nothing is copied;
data.blend.NAME.path=PREFIX reads the same samples in the same order as from one joined dataset.

With SHARD ... the list is written. One that is there already may get other places of its shards
(after a move) and more shards behind them; anything else would change samples' numbers and is
refused. Without, every shard is checked: its files, index, content and manifest. The exit code is
then 1 when one is bad.

With --remote the .bin files of all shards, or of those that are named, have been copied by you to
FOLDER_URL/NAME.bin (NAME is the last part of a shard's prefix). Each is compared with the list and
noted in SHARD.bin.url; it is read from there once SHARD.bin is gone. Runs and this command read
what KOSMOSG_REMOTE_DATA allows, folder URLs with spaces or commas between them. Exit code 1 when
one is not what the list says; that shard is left as it is.

examples:
  kosmosg shards /data/laion /data/laion.shards/00000 /scratch2/laion/00001
  kosmosg shards /data/laion
  kosmosg shards /data/laion --remote s3://bucket/laion --verify blocks
"""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("shards", __doc__, EPILOG)
    parser.add_argument("prefix", metavar="PREFIX", type=some_text, help="of the whole dataset")
    parser.add_argument(
        "shards",
        nargs="*",
        default=[],  # argparse would call it required otherwise
        type=some_text,
        metavar="SHARD",
        help="prefixes, in their order",
    )
    remote = parser.add_argument_group("object storage")
    remote.add_argument(
        "--remote", type=some_text, metavar="FOLDER_URL", help="where the .bin files were copied to"
    )
    remote.add_argument(
        "--verify",
        choices=VERIFY,
        help="what is compared: sizes; also the fingerprint (256 blocks); also every byte with the "
        "local file (size; with --delete-local whole)",
    )
    remote.add_argument(
        "--delete-local",
        action="store_true",
        help="delete each SHARD.bin whose copy is right: every byte is compared, or with --verify "
        "blocks the fingerprint",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when all is well, 1 when a shard is bad, 2 when the input cannot be used."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.remote is None and (args.verify is not None or args.delete_local):
        parser.error("--verify and --delete-local need --remote")
    return run_command(lambda: _shards(args))


def _shards(args: argparse.Namespace) -> int:
    from megatron_kosmosg.preprocess.shards_of_dataset import check_shards, list_shards

    if args.remote is not None:
        return _note_copies(args)
    if args.shards:
        made = list_shards(args.prefix, args.shards)
        size = sum(entry.num_bytes for entry in made.shards)
        counts = f"{len(made.shards):,} shards, {made.num_samples:,} samples, {size:,} bytes"
        print(printable(f"{args.prefix}: {made.kind}, {counts}"))
        return exit_codes.DONE
    num_bad = num_shards = 0
    for checked in check_shards(args.prefix):
        entry = checked.entry
        num_shards += 1
        num_bad += checked.problem is not None
        stands = f"{entry.path}: samples {entry.first_sample:,} to "
        stands += f"{entry.first_sample + entry.num_samples - 1:,}, {entry.num_bytes:,} bytes"
        print(printable(f"{stands}: {checked.problem or 'good'}"), flush=True)
    print(f"{num_shards:,} shards, {num_bad:,} bad")
    return exit_codes.FAILURE if num_bad else exit_codes.DONE


def _note_copies(args: argparse.Namespace) -> int:
    from megatron_kosmosg.preprocess.remote_shards import note_copies

    num_bad = num_shards = 0
    for found in note_copies(args.prefix, args.shards, args.remote, args.verify, args.delete_local):
        num_shards += 1
        num_bad += found.problem is not None
        done = "noted, the local file is deleted" if found.is_deleted else "noted"
        print(printable(f"{found.shard}: {found.url}: {found.problem or done}"), flush=True)
    print(f"{num_shards:,} shards, {num_bad:,} bad")
    return exit_codes.FAILURE if num_bad else exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
