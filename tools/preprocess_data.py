#!/usr/bin/env python
"""Raw files -> the dataset that training reads (PREFIX.bin, .idx, .json and sentence tables)."""

from __future__ import annotations

import argparse
import sys

from megatron_kosmosg.data.manifest import KINDS
from megatron_kosmosg.data.preprocess.progress import ProgressLine
from megatron_kosmosg.data.preprocess.run import PreprocessJob, preprocess, summary

EPILOG = """\
records, one JSON object a line; pictures are named relative to the folder of the JSONL file:
  text           {"text"}
  caption        {"key", "image", "caption"}
  interleaved    {"key", "content": [{"text": ..} or {"image": ..}, ...]}
  edit           {"key", "caption", "image", "instruction", "target"}
  compositional  {"key", "caption", "image", "entities": [
                    {"text", "span": [start, end), "image", "mask": file or null}, ...]}
"key" is optional; further fields are kept with the sample. `span` counts characters of the caption
and holds the entity's words. A mask has one channel, the size of its image, and 255 = entity.

examples:
  tools/preprocess_data.py --kind text --input 'corpus/*.jsonl' \\
      --tokenizer-model sentencepiece.bpe.model --output-prefix data/text --workers 8
  tools/preprocess_data.py --kind compositional --input scenes.jsonl --max-rejects 0 \\
      --tokenizer-model sentencepiece.bpe.model --output-prefix data/scenes

The output is the same for any number of workers. Records that cannot be used go to
PREFIX.rejects.jsonl with a reason each; an existing dataset of that name is replaced at the end.
"""


def main() -> int:
    """0 when the dataset is complete, 1 (message on stderr) when nothing was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=KINDS, required=True, help="what a record is")
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="files or quoted globs"
    )
    parser.add_argument(
        "--tokenizer-model", required=True, metavar="SPM", help="SentencePiece model file"
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="P", help="path without an extension"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    parser.add_argument(
        "--max-rejects",
        type=int,
        default=100,
        metavar="N",
        help="fail when more records than this are left out (100)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="read only the first N records")
    given = parser.parse_args()
    job = PreprocessJob(
        given.kind,
        tuple(given.input),
        given.tokenizer_model,
        given.output_prefix,
        given.workers,
        given.max_rejects,
        given.limit,
    )
    try:
        report = preprocess(job, ProgressLine())
    except (ValueError, OSError) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 1
    print(summary(report.counts))
    print(f"{given.output_prefix}: {given.kind}, {report.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
