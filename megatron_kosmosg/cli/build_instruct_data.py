"""Images -> captions -> entities -> masks -> records for `preprocess --kind compositional`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_dtype,
    command_parser,
    existing_file,
    file_path,
    natural_int,
    positive_int,
    report_error,
    run_command,
    share,
    some_text,
)
from megatron_kosmosg.terminal_text import printable_lines

if TYPE_CHECKING:
    from megatron_kosmosg.construction.build_run import BuildJob
    from megatron_kosmosg.construction.step_rows import StepFolder

EPILOG = """\
Each step takes a local folder of transformers or a JSONL file of your own:
  --captions  BLIP-2 folder | FILE {"key", "caption"} | input (captions that came with the images)
  --entities  folder of a language model | FILE {"key", "entities": [{"text", "span"}, ..]} |
              noun-phrases (no model)
  --masks     CLIPSeg folder | FILE {"key", "entities": [{"text", "span", "mask": PNG or null}, ..]}
One file may serve all three. A key is the image's name in its folder without the ending. Leave
--masks (and --entities) out to stop before that step; the same command with it goes on.

examples:
  kosmosg build-data --input images --output built --captions blip2-opt-6.7b \\
      --entities qwen2.5-7b-instruct --masks clipseg-rd64-refined
  kosmosg build-data --input 'laion/*.tar' --output built --captions input \\
      --entities noun-phrases --masks clipseg-rd64-refined
  kosmosg launch --ranks 8 build-data --input image_ids_and_rotation.csv ...
  kosmosg preprocess --kind compositional --input 'built/records/*.tar' ...

Ranks of torchrun, srun and mpirun and the tasks of a Slurm job array (--array=0-N) share the work.
After an interruption the same command goes on where it stopped, also with another number of ranks.
Who finishes last writes report.txt, report.json and contact_sheet.png. docs/data_construction.md
tells the rest. Exit codes: 0 this share is done; 1 nothing could be built; 2 wrong arguments or
input; 130 interrupted.
"""
SHEET_CELL = 160


def build_parser() -> CommandParser:
    """The parser of the command, with its options grouped by what they are about."""
    parser = command_parser("build-data", __doc__, EPILOG)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        type=some_text,
        required=True,
        metavar="IMAGES",
        help="folders, tar files, Open Images' CSV list, or whatever --kind caption reads",
    )
    add("--output", type=file_path, required=True, metavar="FOLDER", help="for records and report")
    add(
        "--captions",
        type=some_text,
        required=True,
        metavar="FROM",
        help="model folder, file, or input",
    )
    add("--entities", type=some_text, metavar="FROM", help="model folder, file, or noun-phrases")
    add("--masks", type=some_text, metavar="FROM", help="model folder or file")
    add("--limit", type=positive_int, metavar="N", help="use only the first N images")
    add(
        "--image-root",
        type=some_text,
        metavar="DIR",
        help="folder of the images, if not that of the input file",
    )
    choices = parser.add_argument_group("what is kept").add_argument
    choices("--max-entities", type=positive_int, default=5, metavar="N", help="of an image (5)")
    choices("--threshold", type=share, default=0.3, metavar="P", help="of a mask's pixels (0.3)")
    choices(
        "--min-entity-side",
        type=positive_int,
        default=32,
        metavar="N",
        help="pixels of its box (32)",
    )
    choices(
        "--min-image-side",
        type=positive_int,
        default=1,
        metavar="N",
        help="pixels of an image (1)",
    )
    choices(
        "--entity-prompt",
        type=existing_file,
        metavar="FILE",
        help="text to ask the language model with, {caption} where the caption goes",
    )
    choices("--caption-tokens", type=positive_int, default=30, metavar="N", help="at most (30)")
    choices("--entity-tokens", type=positive_int, default=64, metavar="N", help="at most (64)")
    choices(
        "--image-size",
        type=positive_int,
        default=512,
        metavar="N",
        help="larger squares are made smaller (512)",
    )
    parser.renamed("--picture-size", "--image-size")
    choices("--image-format", choices=("jpg", "png"), default="jpg", help="of records (jpg)")
    parser.renamed("--picture-format", "--image-format")
    group = parser.add_argument_group("work")
    work = group.add_argument
    work("--batch-size", type=positive_int, default=16, metavar="N", help="of every model (16)")
    add_dtype(group, "the models")
    parser.renamed("--precision", "--dtype")
    work("--threads", type=positive_int, default=4, metavar="N", help="that decode (4)")
    parser.renamed("--workers", "--threads")
    work(
        "--shard-size",
        type=positive_int,
        default=1000,
        metavar="N",
        help="images whose work is lost at most when a process ends (1000)",
    )
    work(
        "--sheet-rows",
        type=natural_int,
        default=16,
        metavar="N",
        help="records on the contact sheet (16); 0 writes none",
    )
    parser.renamed("--sheet", "--sheet-rows")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when this process's share is done; otherwise another exit code, with a message on
    stderr."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.masks is not None and args.entities is None:
        parser.error("--masks needs --entities: what is to be found in the images")
    return run_command(
        lambda: _build(args), "interrupted; the same command goes on from here", "--output"
    )


def _build(args: argparse.Namespace) -> int:
    from megatron_kosmosg.construction.build_run import SHEET_FILE, ModelSettings, build
    from megatron_kosmosg.files import fingerprint, naming_disk
    from megatron_kosmosg.launcher import find_worker
    from megatron_kosmosg.parallel.devices import choose_device
    from megatron_kosmosg.parallel.platform import torch_dtype

    place = find_worker()
    models = ModelSettings(
        torch_dtype(args.dtype),
        lambda: choose_device(place),
        fingerprint,
    )
    with naming_disk(args.output):
        built = build(_job(args), place, models)
    if built.report is None:
        print("this process's share is done, others still work")
        return exit_codes.DONE
    print(printable_lines(built.report.text()))
    if built.records is None:
        print(f"stopped before the next step as asked; {args.output} can be looked at")
        return exit_codes.DONE
    if built.report.num_records == 0:
        return report_error("no record could be built", exit_codes.FAILURE)
    _write_sheet(built.records, built.num_shards, args)
    shown = f"   look at: {args.output}/{SHEET_FILE}" if args.sheet_rows else ""
    print(f"records: {built.records.path}/*.tar{shown}")
    print(f"{args.output}: {built.report.last_line()}")
    return exit_codes.DONE


def _job(args: argparse.Namespace) -> BuildJob:
    from megatron_kosmosg.construction.build_run import BuildJob
    from megatron_kosmosg.construction.entity_prompt import CAPTION, PROMPT
    from megatron_kosmosg.construction.record_tars import ImageFormat
    from megatron_kosmosg.preprocess.options import Options

    prompt = PROMPT
    if args.entity_prompt is not None:
        prompt = args.entity_prompt.read_text(encoding="utf-8")
        if CAPTION not in prompt:
            raise ValueError(f"--entity-prompt {args.entity_prompt} has no {CAPTION} in it")
    return BuildJob(
        inputs=args.input,
        output=args.output,
        captions=args.captions,
        entities=args.entities,
        masks=args.masks,
        options=Options(min_image_side=args.min_image_side, image_root=args.image_root),
        form=ImageFormat(args.image_size, args.image_format),
        limit=args.limit,
        max_entities=args.max_entities,
        threshold=args.threshold,
        min_entity_side=args.min_entity_side,
        entity_prompt=prompt,
        caption_tokens=args.caption_tokens,
        entity_tokens=args.entity_tokens,
        shard_size=args.shard_size,
        batch_size=args.batch_size,
        num_threads=args.threads,
        files_read=() if args.entity_prompt is None else (args.entity_prompt,),
    )


def _write_sheet(records: StepFolder, num_shards: int, args: argparse.Namespace) -> None:
    from megatron_kosmosg.construction.build_report import shown_records
    from megatron_kosmosg.construction.build_run import SHEET_FILE
    from megatron_kosmosg.inference.contact_sheet import SheetRow, contact_sheet
    from megatron_kosmosg.inference.image_files import save_atomically

    rows = [
        SheetRow(shown.caption, [("image", shown.target)], shown.entities)
        for shown in shown_records(records, num_shards, args.sheet_rows)
    ]
    if rows:
        save_atomically(contact_sheet(rows, SHEET_CELL), args.output / SHEET_FILE)


if __name__ == "__main__":
    sys.exit(main())
