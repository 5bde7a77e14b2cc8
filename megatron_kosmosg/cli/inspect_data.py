"""What a dataset holds: counts, lengths, tokens, and a page of samples as the model sees them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_config,
    add_seed,
    add_tokenizer_model,
    command_parser,
    file_path,
    natural_int,
    positive_int,
    run_command,
    some_text,
)
from megatron_kosmosg.terminal_text import printable, printable_lines

EPILOG = """\
Prints the manifest, length distributions and token statistics, and writes one self-contained HTML
page with random samples: prompts with their images in place, targets, masks, which labels count.
--check reads every sample and decodes every image; the exit code is then 1 when one is bad.

examples:
  kosmosg inspect data/edit --tokenizer-model sentencepiece.bpe.model
  kosmosg inspect data/edit --config instruct_256gpu --samples 40
  kosmosg inspect data/text --tokenizer-model sentencepiece.bpe.model --check --no-page
"""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("inspect", __doc__, EPILOG)
    parser.add_argument(
        "prefix", type=some_text, metavar="PREFIX", help="dataset, without an extension"
    )
    add_tokenizer_model(parser, "the config's")
    add_config(parser, "gives sizes, probabilities and the tokenizer (the paper's)")
    parser.add_argument(
        "--samples",
        type=positive_int,
        default=24,
        metavar="N",
        help="on the page, or all (24)",
    )
    add_seed(parser, "draws the samples")
    parser.add_argument("--output", type=file_path, metavar="HTML", help="page (PREFIX.html)")
    parser.add_argument("--no-page", action="store_true", help="print only")
    parser.add_argument("--check", action="store_true", help="validate every sample")
    parser.add_argument(
        "--threads", type=positive_int, default=2, metavar="N", help="of --check (2)"
    )
    parser.renamed("--workers", "--threads")
    parser.add_argument(
        "--max-shown", type=natural_int, default=20, metavar="N", help="problems printed (20)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 when --check found a problem, or 2 when the input cannot be used."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.config is None and args.tokenizer_model is None:
        parser.error("give --tokenizer-model or --config")
    return run_command(lambda: _inspect(args), writes="--output")


def _inspect(args: argparse.Namespace) -> int:
    from megatron_kosmosg.config.load import config_files
    from megatron_kosmosg.config.overwrites import refuse_to_overwrite
    from megatron_kosmosg.data.dataset_files import files_read
    from megatron_kosmosg.data.store import SampleStore
    from megatron_kosmosg.data.tokenizer import Tokenizer
    from megatron_kosmosg.inspection.check import check_dataset
    from megatron_kosmosg.inspection.inspection_page import (
        inspection_config,
        summary_text,
        write_page,
    )
    from megatron_kosmosg.progress import Progress

    with tempfile.TemporaryDirectory() as scratch:
        model = None if args.tokenizer_model is None else str(args.tokenizer_model)
        config = inspection_config(args.prefix, args.config, model, args.seed, scratch)
        store = SampleStore(args.prefix)
        # `inspection_config` refuses what names no file.
        tokenizer = Tokenizer(cast(str, config.data.tokenizer_model))
        store.check_tokenizer(tokenizer)
        print(printable_lines(summary_text(store, tokenizer, args.seed)))
        if not args.no_page:
            path = args.output or Path(f"{args.prefix}.html")
            files = [] if args.config is None else config_files(args.config)
            refuse_to_overwrite([path], [*files, *files_read(config)], "--output")
            print(write_page(path, store, tokenizer, config, args.samples))
    if not args.check:
        return exit_codes.DONE
    problems = 0
    with Progress(f"check {args.prefix}", "sample") as progress:
        for problem in check_dataset(store, tokenizer, args.threads, progress):
            problems += 1
            if problems <= args.max_shown:
                at = "dataset" if problem.index is None else f"{problem.index} ({problem.key})"
                progress.write(printable(f"{at}: {problem.reason}"))
    print(f"check: {len(store):,} samples, {problems:,} problems")
    return exit_codes.FAILURE if problems else exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
