"""Scores any images: two folders, or a JSONL file of (generated, reference, text).

Two kinds of score: of pairs (each image against its references and its text: DINO, CLIP-I, CLIP-T),
and of two whole sets of images, which need no partners (FID).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kosmosg.cli.evaluation_options import (
    add_networks,
    add_scoring,
    finish,
    scoring_of,
)
from megatron_kosmosg.command_line import (
    CommandParser,
    command_parser,
    existing_folder,
    file_path,
    run_command,
    some_text,
)

if TYPE_CHECKING:
    from megatron_kosmosg.evaluation.networks import Weights
    from megatron_kosmosg.evaluation.similarity import Item

EPILOG = """\
examples:
  kosmosg evaluate pairs --generated drawn --reference photos --output judged \\
      --dino dino_deitsmall16_pretrain.pth --clip clip-vit-base-patch32
  kosmosg evaluate pairs --pairs pairs.jsonl --clip clip-vit-base-patch32 --output judged
  kosmosg launch --ranks 8 evaluate pairs --generated drawn --reference val2014 \\
      --inception weights-inception-2015-12-05-6726825d.pth --fid-protocol clean-fid --output fid

--dino gives DINO, --clip gives CLIP-I and, where there are texts, CLIP-T; --inception gives FID.
Files of two folders belong together by their names; FID alone needs no partners. A JSONL record is
{"generated": file, "reference": file or list of files, "text": words}, files relative to its
folder, in it or in --image-root.

Writes result.json and report.html; the same command continues an interrupted run. Ranks share the
images, and the result is the same for any number of them. Exit codes: 0 done; 2 wrong arguments or
input; 130 interrupted.
"""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("evaluate pairs", __doc__, EPILOG)
    parser.add_argument(
        "--generated", type=existing_folder, metavar="FOLDER", help="images to be scored"
    )
    parser.add_argument(
        "--reference", type=existing_folder, metavar="FOLDER", help="what they should resemble"
    )
    parser.add_argument("--pairs", type=file_path, metavar="FILE", help="JSONL file, instead")
    parser.add_argument(
        "--image-root",
        type=some_text,
        metavar="DIR",
        help="where images of --pairs may lie besides the folder of that file",
    )
    add_networks(parser, "clean-fid")
    add_scoring(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for input that cannot be used, with a message on stderr."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    folders = (args.generated, args.reference)
    # Exactly one of the two forms, and both folders or none.
    if (args.pairs is None) == (folders == (None, None)) or (None in folders and any(folders)):
        parser.error("give --generated and --reference, or --pairs")
    if args.image_root is not None and args.pairs is None:
        parser.error("--image-root belongs to --pairs, whose images it allows")
    if args.dino is None and args.clip is None and args.inception is None:
        parser.error("give --dino, --clip or --inception: what to score with")
    return run_command(lambda: _evaluate(args), "stopped; the same command continues", "--output")


def _evaluate(args: argparse.Namespace) -> int:
    from megatron_kosmosg.config.errors import ConfigError
    from megatron_kosmosg.config.overwrites import refuse_to_write_into
    from megatron_kosmosg.evaluation.fid import (
        GENERATED,
        REAL,
        fid_groups,
        fid_result,
        gaussian_of,
    )
    from megatron_kosmosg.evaluation.result import Evaluation
    from megatron_kosmosg.evaluation.scoring import find_networks, report, score
    from megatron_kosmosg.evaluation.similarity import similarities, similarity_groups

    if args.image_root is not None and not Path(args.image_root).is_dir():
        raise ConfigError(f"--image-root {args.image_root} is not a folder")
    weights = find_networks(args.dino, args.clip, args.inception)
    items = _items(args, weights)
    if args.pairs is None:
        refuse_to_write_into(args.output, [args.generated, args.reference], "--output")
    groups = similarity_groups(items, weights)
    has_fid = "inception" in weights
    if has_fid:
        generated, real = _sides(args, items)
        groups += fid_groups(args.fid_protocol, generated, real)
    scoring = scoring_of(args, groups, weights)
    # Every rank computes its share of the features; the rank that finds all of them has `evaluate`
    # called, which needs no network any more.
    score(scoring)

    def evaluate(files):
        fid = None
        if has_fid:
            sides = gaussian_of(files, GENERATED), gaussian_of(files, REAL)
            fid = fid_result(args.fid_protocol, *sides)
        protocol = {"pairs": args.pairs.name if args.pairs else "two folders, by file name"}
        scores = similarities(items, weights, files)
        return Evaluation("Images against references", protocol, items, scores, weights, fid)

    return finish(report(scoring, evaluate), scoring.rank_info)


def _items(args: argparse.Namespace, weights: dict[str, Weights]) -> list[Item]:
    """The generated images, each with the references and the text that it is scored against; none
    where FID alone is asked for."""
    from megatron_kosmosg.evaluation.pairs import items_of_file, items_of_folders

    if args.pairs is not None:
        root = None if args.image_root is None else Path(args.image_root)
        return items_of_file(args.pairs, root)
    if weights.keys() == {"inception"}:
        return []
    return items_of_folders(args.generated, args.reference)


def _sides(args: argparse.Namespace, items: Sequence[Item]) -> tuple[list[Path], list[Path]]:
    """(generated images, real images): the two sets whose distributions FID compares. Raises
    ConfigError for a set of fewer than two."""
    from megatron_kosmosg.config.errors import ConfigError
    from megatron_kosmosg.evaluation.pairs import images_in

    if args.pairs is None:
        sides = images_in(args.generated), images_in(args.reference)
    else:
        references = dict.fromkeys(path for item in items for path in item.references)
        sides = [item.generated for item in items], list(references)
    for side, what in zip(sides, ("generated", "reference"), strict=True):
        if len(side) < 2:
            raise ConfigError(f"FID needs two {what} images or more, there are {len(side)}")
    return sides


if __name__ == "__main__":
    sys.exit(main())
