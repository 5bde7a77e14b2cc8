"""Raw files -> the dataset that training reads (PREFIX.bin, .idx, .json and sentence tables)."""

from __future__ import annotations

import argparse
import sys

from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.preprocess.counts import summary, verification
from megatron_kosmosg.preprocess.inputs import FORMATS
from megatron_kosmosg.preprocess.mpi_workers import choose_workers
from megatron_kosmosg.preprocess.options import (
    DOCUMENT_BREAKS,
    MAX_IMAGE_PIXELS,
    VERIFICATIONS,
    Options,
)
from megatron_kosmosg.preprocess.progress import ProgressLine
from megatron_kosmosg.preprocess.run import PreprocessJob, TooManyRejects, preprocess

EPILOG = """\
records, one JSON object a line; pictures are named relative to the folder of the JSONL file:
{records}
"key" is optional; further fields are kept with the sample. `span` counts characters of the caption
and holds the entity's words. A mask has one channel, the size of its image, and 255 = entity; null
says there is no background to remove; without the field the image's alpha channel is the mask.
docs/data.md has the layouts of public datasets (img2dataset, MMC4, OBELICS, InstructPix2Pix, the
authors' TSV files) that are read as they are, with a record of each.

examples:
  tools/preprocess_data.py --kind text --input 'corpus/*.jsonl' \\
      --tokenizer-model sentencepiece.bpe.model --output-prefix data/text --workers 8
  tools/preprocess_data.py --kind caption --input 'laion/000*.tar' --max-rejects 5000 \\
      --tokenizer-model sentencepiece.bpe.model --output-prefix data/laion --workers 8
  mpirun -n 64 python tools/preprocess_data.py --kind caption --input 'laion/*.tar' \\
      --tokenizer-model sentencepiece.bpe.model --output-prefix data/laion --resume

The output is the same for any number of workers and under MPI. Records that cannot be used go to
PREFIX.rejects.jsonl with a reason each; an existing dataset of that name is replaced at the end.
Exit codes: 0 done; 1 too many rejects; 2 wrong arguments or input; 130 interrupted.
"""


def _records() -> str:
    """The records of each kind, for the help text."""
    lines = []
    for kind in KINDS.values():
        first, *more = kind.record.splitlines()
        lines += [f"  {kind.name:<15}{first}", *(f"{'':17}{line}" for line in more)]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG.format(records=_records()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kind", choices=KINDS, required=True, help="what a record is")
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, quoted globs, the authors' json/train.json, or the InstructPix2Pix folder",
    )
    add("--format", choices=FORMATS, default="auto", help="auto: by the ending of the name")
    add("--tokenizer-model", required=True, metavar="SPM", help="SentencePiece model file")
    add("--output-prefix", required=True, metavar="P", help="path without an extension")
    add("--workers", type=int, metavar="N", help="processes (1); not under mpirun or srun")
    add("--resume", action="store_true", help="go on where a killed run of this command stopped")
    add(
        "--max-rejects",
        type=int,
        default=100,
        metavar="N",
        help="fail when more records than this are left out (100)",
    )
    add("--limit", type=int, metavar="N", help="read only the first N records")
    add(
        "--field",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="what the input calls a field, e.g. caption=title; may be repeated",
    )
    add(
        "--text-documents",
        choices=DOCUMENT_BREAKS,
        default="blank",
        help="plain text: a document ends at a blank line, at each line, or at the end of the file",
    )
    pictures = parser.add_argument_group("pictures").add_argument
    pictures(
        "--verify-images",
        choices=VERIFICATIONS,
        default="decode",
        help="header is faster, but a truncated file passes it",
    )
    pictures(
        "--max-image-pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        metavar="N",
        help="reject larger pictures by their header (%(default)s)",
    )
    pictures(
        "--min-image-side",
        type=int,
        default=1,
        metavar="N",
        help="reject pictures whose shorter side has fewer pixels (1)",
    )
    pictures(
        "--image-root", metavar="DIR", help="folder of the pictures, if not that of the input file"
    )
    documents = parser.add_argument_group("--kind interleaved").add_argument
    documents(
        "--min-images", type=int, default=0, metavar="N", help="reject documents with fewer (0)"
    )
    documents(
        "--max-images", type=int, metavar="N", help="keep only the first N pictures of a document"
    )
    documents(
        "--drop-bad-images",
        action="store_true",
        help="leave bad or missing pictures out instead of rejecting the document",
    )
    return parser.parse_args()


def main() -> int:
    """0 when the dataset is complete, else a message on stderr and no new dataset."""
    given = parse_arguments()
    try:
        workers = choose_workers(given.workers)
        report = preprocess(
            job_of(given), ProgressLine() if workers.is_leader else lambda *_: None, workers
        )
    except (ValueError, OSError) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 1 if isinstance(error, TooManyRejects) else 2
    except KeyboardInterrupt:
        print("preprocess_data: interrupted; --resume goes on from here", file=sys.stderr)
        return 130
    if workers.is_leader:
        print(summary(report.counts))
        if report.counts.verified:
            print(f"{verification(report.counts)}: --verify-images {given.verify_images}")
        print(f"{given.output_prefix}: {given.kind}, {report.seconds:.1f} s")
    return 0


def job_of(given: argparse.Namespace) -> PreprocessJob:
    """The job that the arguments ask for. Raises ValueError."""
    for pair in given.field:
        if not all(pair.partition("=")):
            raise ValueError(f"--field {pair} must be OURS=THEIRS, such as caption=title")
    options = Options(
        verify_images=given.verify_images,
        max_image_pixels=given.max_image_pixels,
        min_image_side=given.min_image_side,
        image_root=given.image_root,
        fields=tuple((ours, theirs) for ours, _, theirs in (p.partition("=") for p in given.field)),
        text_documents=given.text_documents,
        min_images=given.min_images,
        max_images=given.max_images,
        drop_bad_images=given.drop_bad_images,
    )
    return PreprocessJob(
        given.kind,
        tuple(given.input),
        given.tokenizer_model,
        given.output_prefix,
        max_rejects=given.max_rejects,
        limit=given.limit,
        format=given.format,
        options=options,
        resume=given.resume,
    )


if __name__ == "__main__":
    sys.exit(main())
