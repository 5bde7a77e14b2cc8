"""Evaluates toy runs on held-out prompts: a table (metrics.json), images and their list."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_seed,
    command_parser,
    file_path,
    number_from_zero,
    positive_int,
    run_command,
)
from megatron_kosmosg.files import replacing, write_json

if TYPE_CHECKING:
    from megatron_kosmosg.toy.evaluation.toy_results import Results

EPILOG = """\
example:
  kosmosg evaluate toy --run pretrain=runs/q/pretrain --run align=runs/q/align \\
      --run instruct=runs/q/instruct --output runs/q/evaluation

Exit codes: 0 all thresholds are met; 2 wrong arguments or runs that cannot be read; 3 a threshold
is missed, as the table shows; 130 interrupted.
"""


def build_parser() -> CommandParser:
    """The command line; runs are still NAME=FOLDER."""
    parser = command_parser("evaluate toy", __doc__, EPILOG)
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="pretrain, align, instruct, or any other name for a further variant of instruct",
    )
    parser.add_argument(
        "--output", type=file_path, required=True, metavar="FOLDER", help="for the results"
    )
    parser.add_argument(
        "--count", type=positive_int, default=64, metavar="N", help="held-out prompts a cell (64)"
    )
    add_seed(parser, "draws prompts and start noise")
    parser.add_argument(
        "--steps", type=positive_int, default=8, metavar="N", help="of the scheduler (8)"
    )
    parser.add_argument(
        "--guidance-scale",
        type=number_from_zero,
        default=2.0,
        metavar="W",
        help="how closely to follow the prompt (2)",
    )
    parser.renamed("--guidance", "--guidance-scale")
    parser.add_argument("--fast", action="store_true", help="8 prompts a cell, no thresholds")
    return parser


def evaluate(args: argparse.Namespace) -> Results:
    """Rows and grids of all runs. Raises ConfigError for a run without a finished checkpoint."""
    from megatron_kosmosg.checkpoint.folder import CONFIG_FILE, find_checkpoint
    from megatron_kosmosg.config.load import load_saved_config
    from megatron_kosmosg.config.overwrites import refuse_to_write_into
    from megatron_kosmosg.data.dataset_files import folders_read
    from megatron_kosmosg.inference.trained_model import TrainedModel, single_process
    from megatron_kosmosg.models.diffusion import load_diffusion
    from megatron_kosmosg.toy.evaluation.toy_generation import Sampling
    from megatron_kosmosg.toy.evaluation.toy_results import ToyResults
    from megatron_kosmosg.toy.evaluation.toy_text_encoder import TextEncoderModel
    from megatron_kosmosg.toy.evaluation.toy_words import word_rows

    runs = dict(entry.split("=", 1) for entry in args.run)
    count = 8 if args.fast else args.count
    sampling = Sampling(args.steps, args.guidance_scale, args.seed)
    last = find_checkpoint(Path(runs["instruct"]), option="--run ")
    config = load_saved_config(last / CONFIG_FILE)
    folders = [find_checkpoint(Path(folder), option="--run ") for folder in runs.values()]
    refuse_to_write_into(args.output, [*folders, *folders_read(config)], "--output")
    with single_process(config) as context:
        models = {}
        for name, folder in runs.items():
            print(f"loading {name} from {folder}", flush=True)
            models[name] = TrainedModel(Path(folder), context)
        toy = ToyResults(load_diffusion(config, context.device), sampling, count, not args.fast)
        if "pretrain" in models:
            print("pretrain: words", flush=True)
            toy.results.rows.extend(
                word_rows(models["pretrain"], args.seed, 4 * count, not args.fast)
            )
        if "align" in models:
            print("align: words to images", flush=True)
            # Without a path `load_diffusion` has raised.
            toy.align(models["align"], TextEncoderModel(config.model.diffusion.path or ""))
        print("instruct: images to images", flush=True)
        toy.instruct(models["instruct"], models.get("align"))
        if "align" in models:
            toy.variant("align only", models["align"])
        for name, model in models.items():
            if name not in {"pretrain", "align", "instruct"}:
                print(f"variant {name}", flush=True)
                toy.variant(name, model)
    return toy.results


def write(results: Results, output: Path) -> None:
    """The grids as PNG files, `images.json` that lists them, and `metrics.json`."""
    output.mkdir(parents=True, exist_ok=True)
    listed = []
    for file, title, caption, image in results.grids:
        with replacing(output / file) as temporary:
            image.save(temporary, "PNG")
        listed.append({"file": file, "title": title, "caption": caption})
    for name, content in (
        ("images.json", listed),
        ("metrics.json", {"rows": [row.to_json() for row in results.rows]}),
    ):
        write_json(output / name, content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for runs that cannot be read, or 3 when a threshold is missed."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    names = [name for name, equals, folder in (r.partition("=") for r in args.run) if folder]
    if len(names) < len(args.run) or "instruct" not in names:
        parser.error("give runs as --run NAME=FOLDER, among them instruct=...")
    return run_command(lambda: _evaluate(args), writes="--output")


def _evaluate(args: argparse.Namespace) -> int:
    results = evaluate(args)
    write(results, args.output)
    for row in results.rows:
        mark = {None: " ", True: "ok", False: "MISSED"}[row.passed]
        limit = "" if row.threshold is None else f"{row.direction} {row.threshold:g}"
        print(f"{row.group:14} {row.name:58} {row.value:8.3f} {limit:9} {mark}")
    is_missed = any(row.passed is False for row in results.rows)
    return exit_codes.MISSED if is_missed else exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
