"""Generates images for one prompt or a JSONL file of prompts, on one process or many.

Long because it is a help page, and what its options say in the terms of inference/.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_dtype,
    add_seed,
    add_stable_diffusion,
    add_tokenizer_model,
    command_parser,
    file_path,
    first_line,
    natural_int,
    number_from_zero,
    positive_int,
    report_error,
    run_command,
    some_text,
)
from megatron_kosmosg.foreign_files import parse_json
from megatron_kosmosg.inference.noise_schedules import SAVED, SCHEDULERS

if TYPE_CHECKING:
    from megatron_kosmosg.inference.generation_run import RunRequest
    from megatron_kosmosg.inference.prompt_records import PromptRecord
    from megatron_kosmosg.launcher import RankInfo

EPILOG = """\
examples:
  kosmosg generate --model exported --prompt "<image> in the snow" --image cat.png \\
      --num-images 4 --output drawn
  kosmosg generate --model runs/instruct --stable-diffusion stable-diffusion-v1-5 \\
      --content '[{"text": "a"}, {"image": "cat.png"}, {"text": "on a beach"}]' --output drawn
  kosmosg launch --ranks 8 generate --model exported \\
      --prompts prompts.jsonl --scheduler dpm++ --steps 100 --guidance-scale 7.5 --output drawn

A JSONL record is {"prompt": "<image> in snow", "images": ["cat.png"]} or {"content": [{"text": ..}
or {"image": ..}, ...]}, images named relative to the file, in its folder or --image-root.
Optional fields: id (names the results ID-0.png, ID-1.png, ..; the line's number if absent),
negative_prompt, seed, num_images, steps, guidance, height, width, control_image, start_image (which
is drawn over) and strength (the share of the steps that is made on it, 0.75). Drawing options are
the defaults of all records.

The same command continues an interrupted run. An image is drawn again only if something that
decides how it looks has changed. Ranks (launch or srun) share the records; the images are the
same for any number of them. Exit codes: 0 this rank's images are there; 1 a file
server or the machine failed on the way; 2 wrong arguments or input, or a disk that cannot be
written; 130 interrupted.
"""


def build_parser() -> CommandParser:
    """The parser of the command, with its options grouped by what they are about."""
    parser = command_parser("generate", first_line(__doc__), EPILOG)
    parser.add_argument(
        "--model",
        type=file_path,
        required=True,
        metavar="FOLDER",
        help="exported folder, or run or checkpoint of align or instruct",
    )
    add_stable_diffusion(parser, "whose U-Net, VAE and scheduler draw (the model's own)")
    parser.renamed("--sd", "--stable-diffusion")
    add_tokenizer_model(parser, "of a checkpoint: as its config says")
    prompt_source = parser.add_mutually_exclusive_group(required=True)
    prompt_source.add_argument("--prompt", help="one prompt, <image> where each --image goes")
    prompt_source.add_argument(
        "--content", help="one prompt as a JSON list of text and image entries"
    )
    prompt_source.add_argument(
        "--prompts", type=file_path, metavar="FILE", help="JSONL file of prompts"
    )
    parser.add_argument(
        "--image",
        type=file_path,
        action="append",
        default=[],
        metavar="FILE",
        help="of --prompt; repeatable",
    )
    parser.add_argument(
        "--image-root",
        type=some_text,
        metavar="DIR",
        help="where images of --prompts may lie besides the folder of that file",
    )
    parser.add_argument(
        "--output", type=file_path, required=True, metavar="FOLDER", help="for the results"
    )
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument("--negative-prompt", default="", metavar="TEXT", help="what not to draw")
    parser.renamed("--negative", "--negative-prompt")
    drawing.add_argument(
        "--num-images", type=positive_int, default=1, metavar="N", help="of each prompt (1)"
    )
    add_seed(drawing, "of the start noise")
    drawing.add_argument(
        "--steps", type=positive_int, default=50, metavar="N", help="of the scheduler (50)"
    )
    drawing.add_argument(
        "--guidance-scale",
        type=number_from_zero,
        default=6.0,
        metavar="W",
        help="how closely to follow the prompt (6); 1 or less: no guidance",
    )
    parser.renamed("--guidance", "--guidance-scale")
    drawing.add_argument("--height", type=positive_int, metavar="PIXELS", help="(the model's)")
    drawing.add_argument("--width", type=positive_int, metavar="PIXELS", help="(the model's)")
    drawing.add_argument(
        "--scheduler", choices=(SAVED, *SCHEDULERS), default=SAVED, help="which sampler (as saved)"
    )
    added = parser.add_argument_group("additions")
    added.add_argument(
        "--lora",
        type=file_path,
        action="append",
        default=[],
        metavar="PATH",
        help="U-Net LoRA, a file or the folder of one; repeatable",
    )
    added.add_argument(
        "--lora-scale",
        type=number_from_zero,
        action="append",
        default=[],
        metavar="S",
        help="one per LoRA",
    )
    added.add_argument(
        "--controlnet", type=file_path, metavar="FOLDER", help="ControlNet for the U-Net"
    )
    added.add_argument("--control-image", type=file_path, metavar="FILE", help="what it sees")
    added.add_argument(
        "--control-scale", type=number_from_zero, default=1.0, metavar="S", help="(1)"
    )
    running = parser.add_argument_group("running")
    add_dtype(running, "all weights", None, "fp16 on a GPU, fp32 on a CPU")
    running.add_argument(
        "--device", help="as torch names it (the rank's GPU if there is one, else the CPU)"
    )
    running.add_argument(
        "--batch-size", type=positive_int, default=1, metavar="N", help="prompts drawn together (1)"
    )
    running.add_argument(
        "--sheet-rows",
        type=natural_int,
        default=40,
        metavar="N",
        help="prompts on the contact sheet (40); 0 writes none",
    )
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line (None: the process's); contradicting options end the process."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.image and args.prompt is None:
        parser.error("--image belongs to --prompt; --content and --prompts name their images")
    if args.lora_scale and len(args.lora_scale) != len(args.lora):
        parser.error(f"{len(args.lora_scale)} --lora-scale for {len(args.lora)} --lora")
    if args.image_root and args.prompts is None:
        parser.error("--image-root belongs to --prompts, whose images it allows")
    if args.control_image and not args.controlnet:
        parser.error("--control-image needs --controlnet")
    return args


def request_of(args: argparse.Namespace, rank_info: RankInfo) -> RunRequest:
    """Raises PromptError or ConfigError for what cannot be used."""
    from megatron_kosmosg.config.errors import ConfigError
    from megatron_kosmosg.inference.generation_run import RunRequest
    from megatron_kosmosg.inference.model_source import find_model
    from megatron_kosmosg.inference.prompt_records import GenerationOptions
    from megatron_kosmosg.parallel.devices import named_device

    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise ConfigError(f"--output {args.output} is a file; give a folder")
    strengths = args.lora_scale or [1.0] * len(args.lora)
    device = named_device(args.device, rank_info)
    return RunRequest(
        records=_records(args),
        is_list=args.prompts is not None,
        source=find_model(
            args.model,
            args.stable_diffusion,
            args.tokenizer_model,
            tuple(zip(args.lora, strengths, strict=True)),
            (args.controlnet, args.control_scale) if args.controlnet else None,
        ),
        defaults=GenerationOptions(
            negative_prompt=args.negative_prompt,
            seed=args.seed,
            num_images=args.num_images,
            steps=args.steps,
            guidance=args.guidance_scale,
            height=args.height,
            width=args.width,
            control_image=args.control_image,
        ),
        scheduler=args.scheduler,
        dtype=args.dtype or ("fp32" if device.type == "cpu" else "fp16"),
        device=device,
        output=args.output,
        batch_size=args.batch_size,
        sheet_rows=args.sheet_rows,
    )


def _records(args: argparse.Namespace) -> list[PromptRecord]:
    from megatron_kosmosg.inference.prompt_records import (
        GenerationOptions,
        PromptError,
        PromptRecord,
        interleaved_content,
        read_records,
        split_prompt,
    )

    if args.prompts is not None:
        if args.image_root is not None and not Path(args.image_root).is_dir():
            raise PromptError(f"--image-root {args.image_root} is not a folder")
        root = None if args.image_root is None else Path(args.image_root)
        return read_records(args.prompts, root)
    if args.prompt is not None:
        place, content = "--prompt", split_prompt(args.prompt, args.image, "--prompt")
    else:
        try:
            listed = parse_json(args.content)
        except ValueError as error:
            raise PromptError(f"--content is not JSON: {error}") from error
        place, content = "--content", interleaved_content(listed, Path(), "--content")
    return [PromptRecord(None, content, GenerationOptions(seed=args.seed), place=place)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when this rank's images are all there; with a message on stderr 2 when nothing
    was drawn or the disk is full, 1 when a file server or the machine failed on the way, 130 on
    Ctrl-C."""
    args = parse(arguments)
    return run_command(lambda: _generate(args), "stopped; the same command continues", "--output")


def _generate(args: argparse.Namespace) -> int:
    from megatron_kosmosg.inference.generation_run import run as draw
    from megatron_kosmosg.launcher import find_rank_info

    rank_info = find_rank_info()
    try:
        finished = draw(request_of(args, rank_info), rank_info)
    except OSError as error:
        if exit_codes.of_os_error(error) != exit_codes.FAILURE:
            raise
        return report_error(f"{error}; the same command continues", exit_codes.FAILURE)
    rank = f"rank {rank_info.rank}: " if rank_info.world_size > 1 else ""
    print(f"{rank}{finished.num_drawn} drawn, {finished.num_kept} kept in {args.output}")
    if finished.sheet is not None:
        print(f"{rank}contact sheet: {finished.sheet}")
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
