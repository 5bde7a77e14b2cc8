"""What a dataset holds: counts, lengths, tokens, and a page of samples as the model sees them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

EPILOG = """\
Prints the manifest, length distributions and token statistics, and writes one self-contained HTML
page with random samples: prompts with their pictures in place, targets, masks, which labels count.
--check reads every sample and decodes every picture; the exit code is then 1 when one is bad.

examples:
  tools/inspect_data.py data/edit --tokenizer-model sentencepiece.bpe.model
  tools/inspect_data.py data/edit --config examples/configs/instruct_256gpu.yaml --samples 40
  tools/inspect_data.py data/text --tokenizer-model sentencepiece.bpe.model --check --no-page
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", metavar="PREFIX", help="dataset, without an extension")
    parser.add_argument("--tokenizer-model", metavar="SPM", help="SentencePiece model file")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="training config that gives sizes, probabilities and the tokenizer (paper's values)",
    )
    parser.add_argument("--samples", type=int, default=24, metavar="N", help="on the page (24)")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples (0)")
    parser.add_argument("--output", type=Path, metavar="HTML", help="page (PREFIX.html)")
    parser.add_argument("--no-page", action="store_true", help="print only")
    parser.add_argument("--check", action="store_true", help="validate every sample")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="of --check (2)")
    parser.add_argument(
        "--max-shown", type=int, default=20, metavar="N", help="problems printed (20)"
    )
    given = parser.parse_args()
    if given.config is None and given.tokenizer_model is None:
        parser.error("give --tokenizer-model or --config")
    if given.samples < 1 or given.workers < 1:
        parser.error("--samples and --workers must be at least 1")
    return given


def main() -> int:
    """0; 1 when --check found a problem; 2 when the input cannot be used."""
    given = parse()
    from megatron_kosmosg.config.overwrites import refuse_to_overwrite
    from megatron_kosmosg.data.minute_lines import MinuteLines
    from megatron_kosmosg.data.store import SampleStore
    from megatron_kosmosg.data.tokenizer import Tokenizer
    from megatron_kosmosg.inspection.check import check_dataset
    from megatron_kosmosg.inspection.page import (
        inspection_config,
        summary_text,
        write_page,
    )

    problems = 0
    try:
        with tempfile.TemporaryDirectory() as scratch:
            config = inspection_config(
                given.prefix, given.config, given.tokenizer_model, given.seed, scratch
            )
            store, tokenizer = SampleStore(given.prefix), Tokenizer(config.data.tokenizer_model)
            store.check_tokenizer(tokenizer)
            print(summary_text(store, tokenizer, given.seed))
            if not given.no_page:
                path = given.output or Path(f"{given.prefix}.html")
                reads = [Path(f"{given.prefix}{end}") for end in (".bin", ".idx", ".json")]
                given_files = [given.config, given.tokenizer_model]
                reads += [Path(name) for name in given_files if name is not None]
                refuse_to_overwrite([path], reads, "--output")
                print(write_page(path, store, tokenizer, config, given.samples))
        if given.check:
            lines = MinuteLines(f"check {given.prefix}")
            for problem in check_dataset(store, tokenizer, given.workers, lines):
                problems += 1
                if problems <= given.max_shown:
                    at = "dataset" if problem.index is None else f"{problem.index} ({problem.key})"
                    print(f"{at}: {problem.reason}")
            print(f"check: {len(store):,} samples, {problems:,} problems")
    except (ValueError, OSError) as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("inspect_data: interrupted", file=sys.stderr)
        return 130
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
