"""Pictures -> captions -> entities -> masks -> records for `preprocess_data.py --kind
compositional`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_kosmosg.construction.rows import StepFolder
    from megatron_kosmosg.construction.run import BuildJob

EPILOG = """\
Each step takes a local folder of transformers or a JSONL file of your own:
  --captions  BLIP-2 folder | FILE {"key", "caption"} | input (captions that came with the pictures)
  --entities  folder of a language model | FILE {"key", "entities": [{"text", "span"}, ..]} |
              noun-phrases (no model)
  --masks     CLIPSeg folder | FILE {"key", "entities": [{"text", "span", "mask": PNG or null}, ..]}
One file may serve all three. A key is the picture's name in its folder without the ending. Leave
--masks (and --entities) out to stop before that step; the same command with it goes on.

examples:
  tools/build_instruct_data.py --input pictures --output built --captions blip2-opt-6.7b \\
      --entities qwen2.5-7b-instruct --masks clipseg-rd64-refined
  tools/build_instruct_data.py --input 'laion/*.tar' --output built --captions input \\
      --entities noun-phrases --masks clipseg-rd64-refined
  torchrun --nproc-per-node 8 tools/build_instruct_data.py --input image_ids_and_rotation.csv ...
  tools/preprocess_data.py --kind compositional --input 'built/records/*.tar' ...

Ranks of torchrun, srun and mpirun and the tasks of a Slurm job array (--array=0-N) share the work.
After an interruption the same command goes on where it stopped, also with another number of ranks.
Who finishes last writes report.txt, report.json and contact_sheet.png. docs/data_construction.md
tells the rest. Exit codes: 0 this share is done; 1 nothing could be built; 2 wrong arguments or
input; 130 interrupted.
"""
SHEET_FILE, SHEET_CELL = "contact_sheet.png", 160


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PICTURES",
        help="folders, tar files, Open Images' CSV list, or whatever --kind caption reads",
    )
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--captions", required=True, metavar="FROM", help="model folder, file, or input")
    add("--entities", metavar="FROM", help="model folder, file, or noun-phrases")
    add("--masks", metavar="FROM", help="model folder or file")
    add("--limit", type=_positive, metavar="N", help="use only the first N pictures")
    add("--image-root", metavar="DIR", help="folder of the pictures, if not that of the input file")
    choices = parser.add_argument_group("what is kept").add_argument
    choices("--max-entities", type=_positive, default=5, metavar="N", help="of a picture (5)")
    choices("--threshold", type=_share, default=0.3, metavar="P", help="of a mask's pixels (0.3)")
    choices(
        "--min-entity-side", type=_positive, default=32, metavar="N", help="pixels of its box (32)"
    )
    choices(
        "--min-image-side", type=_positive, default=1, metavar="N", help="pixels of a picture (1)"
    )
    choices(
        "--entity-prompt",
        type=Path,
        metavar="FILE",
        help="text to ask the language model with, {caption} where the caption goes",
    )
    choices("--caption-tokens", type=_positive, default=30, metavar="N", help="at most (30)")
    choices("--entity-tokens", type=_positive, default=64, metavar="N", help="at most (64)")
    choices(
        "--picture-size",
        type=_positive,
        default=512,
        metavar="N",
        help="larger squares are made smaller (512)",
    )
    choices("--picture-format", choices=("jpg", "png"), default="jpg", help="of records (jpg)")
    work = parser.add_argument_group("work").add_argument
    work("--batch-size", type=_positive, default=16, metavar="N", help="of every model (16)")
    work("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of models (fp32)")
    work("--workers", type=_positive, default=4, metavar="N", help="decoding threads (4)")
    work(
        "--shard-size",
        type=_positive,
        default=1000,
        metavar="N",
        help="pictures whose work is lost at most when a process ends (1000)",
    )
    work("--sheet", type=int, default=16, metavar="N", help="records on the contact sheet (16)")
    given = parser.parse_args(arguments)
    if given.masks is not None and given.entities is None:
        parser.error("--masks needs --entities: what is to be found in the pictures")
    return given


def main(arguments: list[str] | None = None) -> int:
    """0 when this process's share is done; else a message on stderr."""
    given = parse(arguments)
    # Imported here: --help and wrong arguments need none of it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from megatron_kosmosg.construction.run import ModelSettings, build
    from megatron_kosmosg.construction.shares import Share, find_share
    from megatron_kosmosg.files import fingerprint
    from megatron_kosmosg.parallel.devices import choose_device
    from megatron_kosmosg.parallel.platform import torch_dtype
    from megatron_kosmosg.parallel.rendezvous import find_place

    try:
        place = find_place(os.environ)
        share = find_share(os.environ, Share(place.rank, place.world_size, place.local_rank))
        models = ModelSettings(
            torch_dtype(given.precision),
            lambda: choose_device(replace(place, local_rank=share.local_rank)),
            fingerprint,
        )
        built = build(_job(given), share, models)
    except (ValueError, OSError) as error:
        print(f"build_instruct_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    if built.report is None:
        print("this process's share is done, others still work")
        return 0
    print(built.report.text())
    if built.records is None:
        print(f"stopped before the next step as asked; {given.output} can be looked at")
        return 0
    if built.report.num_records == 0:
        print("build_instruct_data: no record could be built", file=sys.stderr)
        return 1
    _write_sheet(built.records, built.num_shards, given)
    print(f"records: {built.records.path}/*.tar   look at: {given.output}/{SHEET_FILE}")
    return 0


def _job(given: argparse.Namespace) -> BuildJob:
    from megatron_kosmosg.construction.entity_prompt import CAPTION, PROMPT
    from megatron_kosmosg.construction.records import PictureForm
    from megatron_kosmosg.construction.run import BuildJob
    from megatron_kosmosg.preprocess.options import Options

    prompt = PROMPT
    if given.entity_prompt is not None:
        prompt = given.entity_prompt.read_text(encoding="utf-8")
        if CAPTION not in prompt:
            raise ValueError(f"--entity-prompt {given.entity_prompt} has no {CAPTION} in it")
    return BuildJob(
        inputs=given.input,
        output=given.output,
        captions=given.captions,
        entities=given.entities,
        masks=given.masks,
        options=Options(min_image_side=given.min_image_side, image_root=given.image_root),
        form=PictureForm(given.picture_size, given.picture_format),
        limit=given.limit,
        max_entities=given.max_entities,
        threshold=given.threshold,
        min_entity_side=given.min_entity_side,
        entity_prompt=prompt,
        caption_tokens=given.caption_tokens,
        entity_tokens=given.entity_tokens,
        shard_size=given.shard_size,
        batch_size=given.batch_size,
        num_threads=given.workers,
    )


def _write_sheet(records: StepFolder, num_shards: int, given: argparse.Namespace) -> None:
    from megatron_kosmosg.construction.report import shown_records
    from megatron_kosmosg.inference.contact_sheet import SheetRow, contact_sheet
    from megatron_kosmosg.inference.picture_files import save_atomically

    rows = [
        SheetRow(shown.caption, [("picture", shown.target)], shown.entities)
        for shown in shown_records(records, num_shards, given.sheet)
    ]
    if rows:
        save_atomically(contact_sheet(rows, SHEET_CELL), given.output / SHEET_FILE)


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
