"""DreamBench: generates the 750 prompts of 30 subjects (or 30 pairs), and scores the images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
from megatron_kosmosg.cli.evaluation_options import add_networks, add_scoring, finish, scoring_of
from megatron_kosmosg.command_line import (
    CommandParser,
    command_parser,
    existing_folder,
    positive_int,
    run_command,
)

if TYPE_CHECKING:
    from megatron_kosmosg.evaluation.dreambench import DreamBenchCase
    from megatron_kosmosg.inference.prompt_records import PromptRecord

EPILOG = """\
example:
  kosmosg evaluate dreambench --model exported --dreambooth dreambooth --output judged \\
      --dino dino_deitsmall16_pretrain.pth --clip clip-vit-base-patch32

--dreambooth is a checkout of google/dreambooth; its images are read where they are. Three steps,
generate, score and report, each of which continues where it was stopped. Ranks take one at a time:
  kosmosg launch --ranks 8 evaluate dreambench ... --only generate
  kosmosg launch --ranks 8 evaluate dreambench ... --only score
Writes images/, features/, result.json and report.html. Exit codes: 0 done; 2 wrong arguments or
input; 130 interrupted.
"""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("evaluate dreambench", __doc__, EPILOG)
    parser.add_argument(
        "--dreambooth",
        type=existing_folder,
        required=True,
        metavar="FOLDER",
        help="checkout of google/dreambooth, or its dataset/",
    )
    parser.add_argument(
        "--num-subjects",
        type=positive_int,
        choices=(1, 2),
        default=1,
        metavar="N",
        help="1: the authors' 30 subjects; 2: UNO's 30 pairs (1)",
    )
    parser.add_argument(
        "--num-prompts",
        type=positive_int,
        default=25,
        metavar="N",
        help="the first N of the 25 of each subject (25)",
    )
    parser.add_argument(
        "--with-class", action="store_true", help="the model is told what each image shows"
    )
    parser.add_argument(
        "--references",
        choices=("input", "all"),
        default="input",
        help="score against the input image, or all real ones of the subject (input)",
    )
    add_generation(parser, images=4, steps=100, guidance=7.5, scheduler="dpm++")
    add_networks(parser)
    add_scoring(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for input that cannot be used, with a message on stderr."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.num_prompts > 25:
        parser.error(f"--num-prompts {args.num_prompts}: there are 25")
    if args.noise == AUTHORS and args.num_images != 4:
        parser.error("--noise authors belongs to --num-images 4, as they drew")
    if args.only != "generate" and args.dino is None and args.clip is None:
        parser.error("give --dino, --clip or both: what to score with (or --only generate)")
    return run_command(lambda: _evaluate(args), "stopped; the same command continues", "--output")


def _evaluate(args: argparse.Namespace) -> int:
    from megatron_kosmosg.config.overwrites import refuse_to_write_into
    from megatron_kosmosg.evaluation import dreambench
    from megatron_kosmosg.evaluation.result import Evaluation
    from megatron_kosmosg.evaluation.scoring import check_networks, find_networks, report, score
    from megatron_kosmosg.evaluation.similarity import Item, similarities, similarity_groups
    from megatron_kosmosg.launcher import find_worker

    rank_info = find_worker()
    check_ranks(args, rank_info)
    weights = find_networks(args.dino, args.clip)
    listed = dreambench.single_cases if args.num_subjects == 1 else dreambench.pair_cases
    cases = [case for case in listed(with_class=args.with_class) if case.prompt < args.num_prompts]
    data = dreambench.find_images(args.dreambooth)
    refuse_to_write_into(args.output, [args.dreambooth, args.model], "--output")
    check_networks(weights)
    if takes(args, "generate"):
        draw(args, [_record(case, data, args) for case in cases], rank_info)
    if args.only == "generate":
        return exit_codes.DONE
    items = [
        Item(
            f"{case.name}-{i}",
            image_of(args, case.name, i),
            tuple(
                path
                for subject in case.subjects
                for path in (
                    [data[subject.name]]
                    if args.references == "input"
                    else dreambench.real_images(data[subject.name])
                )
            ),
            case.text,
            "+".join(subject.name for subject in case.subjects),
        )
        for case in cases
        for i in range(args.num_images)
    ]
    scoring = scoring_of(args, similarity_groups(items, weights), weights)
    if takes(args, "score"):
        score(scoring)

    def evaluate(files):
        scores = similarities(items, weights, files)
        each = [case for case in cases for _ in range(args.num_images)]
        return Evaluation(
            "DreamBench" if args.num_subjects == 1 else "DreamBench, two subjects",
            {
                "subjects": "30" if args.num_subjects == 1 else "30 pairs (UNO's)",
                "prompts of each": args.num_prompts,
                "references": "the input image" if args.references == "input" else "all real ones",
                "class words in the model's prompt": "yes" if args.with_class else "no",
                **generation_settings(args),
            },
            items,
            scores,
            weights,
            published=[dreambench.PUBLISHED] if args.num_subjects == 1 else [],
            references=("first subject", "second subject")
            if args.num_subjects == 2 and args.references == "input"
            else (),
            warnings=dreambench.warnings_of(
                items, scores, data, takes_all=args.references == "all"
            ),
            groups={
                "subject": [item.cluster for item in items],
                "prompt": [f"{case.prompt:02d}" for case in each],
            },
        )

    return finish(report(scoring, evaluate), scoring.rank_info)


def _record(case: DreamBenchCase, data: dict[str, Path], args: argparse.Namespace) -> PromptRecord:
    from megatron_kosmosg.evaluation.dreambench import (
        AUTHORS_BATCH,
        AUTHORS_IMAGES,
        authors_noise_row,
    )
    from megatron_kosmosg.inference.prompt_records import NoiseRow, PromptPart, PromptRecord

    parts: list[PromptPart] = [case.words[0]]
    for subject, words in zip(case.subjects, case.words[1:], strict=True):
        parts += [data[subject.name], words]
    content = tuple(part for part in parts if part != "")
    if args.noise != AUTHORS:
        return PromptRecord(case.name, content)
    rows = [authors_noise_row(case.prompt, i) for i in range(AUTHORS_IMAGES)]
    noise = tuple(NoiseRow(row, AUTHORS_BATCH * AUTHORS_IMAGES) for row in rows)
    return PromptRecord(case.name, content, noise=noise)


if __name__ == "__main__":
    sys.exit(main())
