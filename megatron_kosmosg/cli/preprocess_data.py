"""Raw files -> the dataset that training reads (PREFIX.bin, .idx, .json and sentence tables)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_tokenizer_model,
    command_parser,
    natural_int,
    positive_int,
    positive_number,
    report_error,
    run_command,
    some_text,
)
from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.preprocess.options import (
    DOCUMENT_BREAKS,
    FORMATS,
    MAX_IMAGE_PIXELS,
    VERIFICATIONS,
    Options,
)
from megatron_kosmosg.terminal_text import printable_lines

if TYPE_CHECKING:
    from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob

EPILOG = """\
records, one JSON object a line; images are named relative to the folder of the JSONL file:
{records}
"key" is optional; further fields are kept with the sample. `span` counts characters of the caption
and holds the entity's words. A mask has one channel, the size of its image, and 255 = entity; null
says there is no background to remove; without the field the image's alpha channel is the mask.
docs/data.md has the layouts of public datasets (img2dataset, MMC4, OBELICS, InstructPix2Pix, the
authors' TSV files) that are read as they are, with a record of each.

examples:
  kosmosg preprocess --kind text --input 'corpus/*.jsonl' \\
      --tokenizer-model sentencepiece.bpe.model --output-prefix data/text --workers 8
  kosmosg preprocess --kind caption --input 'laion/000*.tar' --max-rejects 5000 \\
      --tokenizer-model sentencepiece.bpe.model --output-prefix data/laion --workers 8
  mpirun -n 64 kosmosg preprocess --kind caption --input 'laion/*.tar' \\
      --tokenizer-model sentencepiece.bpe.model --output-prefix data/laion --resume --shard-gib 50

The output is the same for any number of workers and under MPI. Records that cannot be used go to
PREFIX.rejects.jsonl with a reason each; an existing dataset of that name is replaced at the end.
Exit codes: 0 done; 2 wrong arguments or input; 3 too many rejects; 130 interrupted.
"""


def _records() -> str:
    """The records of each kind, for the help text."""
    lines = []
    for kind in KINDS.values():
        first, *more = kind.record.splitlines()
        lines += [f"  {kind.name:<15}{first}", *(f"{'':17}{line}" for line in more)]
    return "\n".join(lines)


def build_parser() -> CommandParser:
    """The parser of the command, with its options grouped by what they are about."""
    parser = command_parser("preprocess", __doc__, EPILOG.format(records=_records()))
    add = parser.add_argument
    add("--kind", choices=KINDS, required=True, help="what a record is")
    add(
        "--input",
        nargs="+",
        type=some_text,
        required=True,
        metavar="FILE",
        help="files, quoted globs, the authors' json/train.json, or the InstructPix2Pix folder",
    )
    add("--format", choices=FORMATS, default="auto", help="auto: by the ending of the name")
    add_tokenizer_model(parser, required=True)
    add(
        "--output-prefix",
        type=some_text,
        required=True,
        metavar="P",
        help="path without an extension",
    )
    add("--workers", type=positive_int, metavar="N", help="processes (1); not under mpirun or srun")
    add("--resume", action="store_true", help="go on where a killed run of this command stopped")
    add(
        "--max-rejects",
        type=natural_int,
        default=100,
        metavar="N",
        help="fail when more records than this are left out (100)",
    )
    add(
        "--shard-gib",
        type=positive_number,
        metavar="N",
        help="write shards of about N GiB of input each, which are not joined (one .bin)",
    )
    add("--limit", type=positive_int, metavar="N", help="read only the first N records")
    add(
        "--field",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="what the input calls a field, e.g. caption=title; may be repeated",
    )
    add(
        "--text-documents",
        choices=DOCUMENT_BREAKS,
        default="blank",
        help="plain text: a document ends at a blank line, at each line, or at the end of the file",
    )
    images = parser.add_argument_group("images").add_argument
    images(
        "--verify-images",
        choices=VERIFICATIONS,
        default="decode",
        help="header is faster, but a truncated file passes it",
    )
    images(
        "--max-image-pixels",
        type=positive_int,
        default=MAX_IMAGE_PIXELS,
        metavar="N",
        help="reject larger images by their header (%(default)s)",
    )
    images(
        "--min-image-side",
        type=positive_int,
        default=1,
        metavar="N",
        help="reject images whose shorter side has fewer pixels (1)",
    )
    images(
        "--image-root",
        type=some_text,
        metavar="DIR",
        help="folder of the images, if not that of the input file",
    )
    documents = parser.add_argument_group("--kind interleaved").add_argument
    documents(
        "--min-images",
        type=natural_int,
        default=0,
        metavar="N",
        help="reject documents with fewer (0)",
    )
    documents(
        "--max-images",
        type=positive_int,
        metavar="N",
        help="keep only the first N images of a document",
    )
    documents(
        "--drop-bad-images",
        action="store_true",
        help="leave bad or missing images out instead of rejecting the document",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when the dataset is complete; otherwise there is a message on stderr and no new
    dataset."""
    args = build_parser().parse_args(arguments)
    return run_command(
        lambda: _preprocess(args), "interrupted; --resume goes on from here", "--output-prefix"
    )


def _preprocess(args: argparse.Namespace) -> int:
    from megatron_kosmosg.preprocess.counts import Counts, last_line, rates, summary, verification
    from megatron_kosmosg.preprocess.mpi_workers import choose_workers
    from megatron_kosmosg.preprocess.preprocess_run import TooManyRejects, preprocess
    from megatron_kosmosg.preprocess.txt import CUT
    from megatron_kosmosg.progress import Progress

    workers = choose_workers(args.workers)
    started = time.monotonic()

    def show(done: int, total: int, counts: Counts) -> None:
        progress(done, total, rates(counts, time.monotonic() - started))

    try:
        with Progress("", "shard", is_shown=workers.is_leader) as progress:
            made = preprocess(job_of(args), show, workers)
    except TooManyRejects as error:
        return report_error(str(error), exit_codes.MISSED)
    if workers.is_leader:
        print(printable_lines(summary(made.counts)))
        if made.counts.verified:
            print(f"{verification(made.counts)}: --verify-images {args.verify_images}")
        if CUT in made.counts.notes:
            print("hint: --text-documents line makes a document of each line of a .txt file")
        print(f"{args.output_prefix}: {args.kind}, {made.seconds:.1f} s, {last_line(made.counts)}")
    return exit_codes.DONE


def job_of(args: argparse.Namespace) -> PreprocessJob:
    """The job that the arguments ask for. Raises ValueError."""
    from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob

    for pair in args.field:
        if not all(pair.partition("=")):
            raise ValueError(f"--field {pair} must be FIELD=NAME, such as caption=title")
    options = Options(
        verify_images=args.verify_images,
        max_image_pixels=args.max_image_pixels,
        min_image_side=args.min_image_side,
        image_root=args.image_root,
        fields=tuple(
            (field, input_name) for field, _, input_name in (p.partition("=") for p in args.field)
        ),
        text_documents=args.text_documents,
        min_images=args.min_images,
        max_images=args.max_images,
        drop_bad_images=args.drop_bad_images,
    )
    return PreprocessJob(
        args.kind,
        tuple(args.input),
        str(args.tokenizer_model),
        args.output_prefix,
        max_rejects=args.max_rejects,
        limit=args.limit,
        format=args.format,
        options=options,
        resume=args.resume,
        shard_gib=args.shard_gib,
    )


if __name__ == "__main__":
    sys.exit(main())
