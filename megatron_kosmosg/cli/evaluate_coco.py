"""COCO FID: generates captions of val2014 by the authors' rule, and compares with its images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_kosmosg import exit_codes
from megatron_kosmosg.cli.evaluation_generation import (
    AUTHORS,
    add_generation,
    check_ranks,
    draw,
    generation_settings,
    image_of,
    takes,
)
from megatron_kosmosg.cli.evaluation_options import (
    add_networks,
    add_scoring,
    check_folder,
    finish,
    scoring_of,
)
from megatron_kosmosg.command_line import (
    CommandParser,
    command_parser,
    existing_folder,
    file_path,
    positive_int,
    run_command,
)

NEAREST, DOWN = "nearest", "down"
EPILOG = """\
example:
  kosmosg evaluate coco --model exported --coco coco --output judged \\
      --inception weights-inception-2015-12-05-6726825d.pth --clip clip-vit-base-patch32

--coco holds annotations/captions_val2014.json and val2014/; all its images are the real ones. With
--clip the captions are scored, too. Three steps, generate, score and report, each of which
continues where it was stopped. Ranks take one at a time:
  kosmosg launch --ranks 8 evaluate coco ... --only generate
  kosmosg launch --ranks 8 evaluate coco ... --only score
Writes images/, features/, result.json and report.html. --real-statistics keeps mean and covariance
of the real images for other models. Exit codes: 0 done; 2 wrong arguments or input; 130
interrupted.
"""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("evaluate coco", __doc__, EPILOG)
    parser.add_argument(
        "--coco",
        type=existing_folder,
        required=True,
        metavar="FOLDER",
        help="with annotations/captions_val2014.json and val2014/",
    )
    parser.add_argument(
        "--num-captions",
        type=positive_int,
        default=30_000,
        metavar="N",
        help="drawn by the authors' rule (30000)",
    )
    parser.add_argument(
        "--real-statistics",
        type=file_path,
        metavar="FILE",
        help="of the real images: read if it is there, else written",
    )
    parser.add_argument(
        "--rounding",
        choices=(NEAREST, DOWN),
        default=NEAREST,
        help="of drawn values to bytes; down: as the authors' first run compares them (nearest)",
    )
    add_generation(parser, images=1, steps=250, guidance=3.0, scheduler="ddim")
    add_networks(parser, "kosmosg-rerun")
    add_scoring(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for input that cannot be used, with a message on stderr."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.num_images != 1:
        parser.error(f"--num-images {args.num_images}: each caption is drawn once")
    if args.num_captions < 2:
        parser.error("--num-captions 1: FID needs two images or more")
    if args.only != "generate" and args.inception is None:
        parser.error("give --inception: what FID is computed with (or --only generate)")
    return run_command(lambda: _evaluate(args), "stopped; the same command continues", "--output")


def _evaluate(args: argparse.Namespace) -> int:
    from megatron_kosmosg.config.overwrites import refuse_to_overwrite, refuse_to_write_into
    from megatron_kosmosg.evaluation import coco, fid
    from megatron_kosmosg.evaluation.result import Evaluation
    from megatron_kosmosg.evaluation.scoring import check_networks, find_networks, report, score
    from megatron_kosmosg.evaluation.similarity import Item, similarities, similarity_groups
    from megatron_kosmosg.inference.prompt_records import NoiseRow, PromptRecord
    from megatron_kosmosg.launcher import find_worker

    rank_info = find_worker()
    check_ranks(args, rank_info)
    weights = find_networks(args.dino, args.clip, args.inception)
    listed = coco.read_captions(args.coco / coco.CAPTIONS_FILE)
    captions = listed.drawn(args.num_captions)
    names = [f"{i:05d}" for i in range(len(captions))]
    refuse_to_write_into(args.output, [args.coco, args.model], "--output")
    real, recipe, known = [], {}, None
    kept: Path | None = args.real_statistics
    if "inception" in weights:
        real = coco.real_images(args.coco, listed)
        recipe = fid.recipe_of(args.fid_protocol, weights["inception"], real)
    if kept is not None:
        check_folder(kept.parent, "--real-statistics")
        files = [args.inception, args.coco / coco.CAPTIONS_FILE]
        refuse_to_overwrite([kept], [file for file in files if file], "--real-statistics")
        known = fid.read_gaussian(kept, recipe) if kept.exists() else None
    check_networks(weights)
    if takes(args, "generate"):
        records = [
            PromptRecord(
                name,
                (caption,),
                noise=(NoiseRow(coco.authors_noise_row(i), coco.AUTHORS_BATCH),)
                if args.noise == AUTHORS
                else (),
            )
            for i, (name, caption) in enumerate(zip(names, captions, strict=True))
        ]
        draw(args, records, rank_info, rounds_down=args.rounding == DOWN)
    if args.only == "generate":
        return exit_codes.DONE
    items = [
        Item(name, image_of(args, name, 0), text=caption)
        for name, caption in zip(names, captions, strict=True)
    ]
    groups = similarity_groups(items, weights)
    groups += fid.fid_groups(
        args.fid_protocol, [item.generated for item in items], [] if known else real
    )
    scoring = scoring_of(args, groups, weights)
    if takes(args, "score"):
        score(scoring)

    def evaluate(files):
        reals = known or fid.gaussian_of(files, fid.REAL)
        if kept is not None and known is None:
            fid.write_gaussian(kept, reals, recipe)
        found = fid.fid_result(args.fid_protocol, fid.gaussian_of(files, fid.GENERATED), reals)
        return Evaluation(
            "COCO val2014",
            {
                "captions": f"{len(captions)} of {len(listed.captions)} by the authors' rule",
                "drawn values to bytes": args.rounding,
                **generation_settings(args),
            },
            items,
            similarities(items, weights, files),
            weights,
            found,
            published=coco.PUBLISHED,
        )

    return finish(report(scoring, evaluate), scoring.rank_info)


if __name__ == "__main__":
    sys.exit(main())
