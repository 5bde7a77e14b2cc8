"""Draws pictures for one prompt or a JSONL file of prompts, on one process or many."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.inference.generation_run import Request, run
from megatron_kosmosg.inference.model_source import find_model
from megatron_kosmosg.inference.noise_schedules import SAVED, SCHEDULERS
from megatron_kosmosg.inference.prompt_records import (
    DrawingOptions,
    PromptError,
    PromptRecord,
    interleaved_content,
    read_records,
    split_prompt,
)
from megatron_kosmosg.parallel.devices import choose_device
from megatron_kosmosg.parallel.rendezvous import Place, find_place

EPILOG = """\
examples:
  tools/generate.py --model exported --prompt "<image> in the snow" --image cat.png \\
      --num-images 4 --output pictures
  tools/generate.py --model runs/instruct --sd stable-diffusion-v1-5 \\
      --content '[{"text": "a"}, {"image": "cat.png"}, {"text": "on a beach"}]' --output pictures
  torchrun --nproc-per-node 8 tools/generate.py --model exported --prompts prompts.jsonl \\
      --scheduler dpm++ --steps 100 --guidance 7.5 --output pictures

A JSONL record is {"prompt": "<image> in snow", "images": ["cat.png"]} or {"content": [{"text": ..}
or {"image": ..}, ...]}, pictures named relative to the file. Optional fields: id (names the
pictures ID-0.png, ID-1.png, ..; the line's number if absent), negative_prompt, seed, num_images,
steps, guidance, height, width, control_image. Drawing options are the defaults of all records.

The same command continues an interrupted run. A picture is drawn again only if something that
decides how it looks has changed. Ranks (torchrun or srun) share the records; the pictures are the
same for any number of them.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line (None: the process's); contradicting options end the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="exported folder, or run or checkpoint of align or instruct",
    )
    parser.add_argument(
        "--sd",
        type=Path,
        metavar="FOLDER",
        help="Stable Diffusion folder whose U-Net, VAE and scheduler draw (the model's own)",
    )
    parser.add_argument(
        "--tokenizer-model",
        type=Path,
        metavar="SPM",
        help="SentencePiece model of a checkpoint (as its config says)",
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="one prompt, <image> where each --image goes")
    asked.add_argument("--content", help="one prompt as a JSON list of text and image entries")
    asked.add_argument("--prompts", type=Path, metavar="FILE", help="JSONL file of prompts")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="repeatable"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for pictures")
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument("--negative", default="", metavar="TEXT", help="what not to draw")
    drawing.add_argument("--num-images", type=_positive, default=1, metavar="N", help="(1)")
    drawing.add_argument("--seed", type=_natural, default=0, help="(0)")
    drawing.add_argument("--steps", type=_positive, default=50, metavar="N", help="(50)")
    drawing.add_argument(
        "--guidance", type=_scale, default=6.0, metavar="W", help="(6); 1 or less: none"
    )
    drawing.add_argument("--height", type=_positive, metavar="PIXELS", help="(the model's)")
    drawing.add_argument("--width", type=_positive, metavar="PIXELS", help="(the model's)")
    drawing.add_argument(
        "--scheduler", choices=(SAVED, *SCHEDULERS), default=SAVED, help="(as saved)"
    )
    added = parser.add_argument_group("additions")
    added.add_argument(
        "--lora", type=Path, action="append", default=[], metavar="FILE", help="U-Net LoRA"
    )
    added.add_argument(
        "--lora-scale", type=_scale, action="append", default=[], metavar="S", help="one per LoRA"
    )
    added.add_argument("--controlnet", type=Path, metavar="FOLDER", help="ControlNet for the U-Net")
    added.add_argument("--control-image", type=Path, metavar="FILE", help="what it sees")
    added.add_argument("--control-scale", type=_scale, default=1.0, metavar="S", help="(1)")
    running = parser.add_argument_group("running")
    running.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of all weights (fp16 on a GPU, fp32 on a CPU)",
    )
    running.add_argument("--device", help="(the rank's GPU if there is one)")
    running.add_argument(
        "--batch-size", type=_positive, default=1, metavar="N", help="prompts drawn together (1)"
    )
    running.add_argument(
        "--sheet-rows",
        type=_natural,
        default=40,
        metavar="N",
        help="prompts on the contact sheet (40); 0 writes none",
    )
    given = parser.parse_args(arguments)
    if given.image and given.prompt is None:
        parser.error("--image belongs to --prompt; --content and --prompts name their pictures")
    if given.lora_scale and len(given.lora_scale) != len(given.lora):
        parser.error(f"{len(given.lora_scale)} --lora-scale for {len(given.lora)} --lora")
    if given.control_image and not given.controlnet:
        parser.error("--control-image needs --controlnet")
    return given


def request_of(given: argparse.Namespace, place: Place) -> Request:
    """Raises PromptError or ConfigError for what cannot be used."""
    if given.output.exists() and not given.output.is_dir():
        raise ConfigError(f"--output {given.output} is a file; give a folder")
    strengths = given.lora_scale or [1.0] * len(given.lora)
    device = _device(given.device, place)
    return Request(
        records=_records(given),
        is_list=given.prompts is not None,
        source=find_model(
            given.model,
            given.sd,
            given.tokenizer_model,
            tuple(zip(given.lora, strengths, strict=True)),
            (given.controlnet, given.control_scale) if given.controlnet else None,
        ),
        defaults=DrawingOptions(
            negative_prompt=given.negative,
            seed=given.seed,
            num_images=given.num_images,
            steps=given.steps,
            guidance=given.guidance,
            height=given.height,
            width=given.width,
            control_image=given.control_image,
        ),
        scheduler=given.scheduler,
        dtype=given.dtype or ("fp32" if device.type == "cpu" else "fp16"),
        device=device,
        output=given.output,
        batch_size=given.batch_size,
        sheet_rows=given.sheet_rows,
    )


def _records(given: argparse.Namespace) -> list[PromptRecord]:
    if given.prompts is not None:
        return read_records(given.prompts)
    if given.prompt is not None:
        content = split_prompt(given.prompt, given.image, "--prompt")
    else:
        try:
            listed = json.loads(given.content)
        except json.JSONDecodeError as error:
            raise PromptError(f"--content is not JSON: {error}") from error
        content = interleaved_content(listed, Path(), "--content")
    return [PromptRecord(None, content, DrawingOptions(seed=given.seed))]


def _device(name: str | None, place: Place) -> torch.device:
    if name is None:
        return choose_device(place)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from error


def main(arguments: list[str] | None = None) -> int:
    """0 when this rank's pictures are all there, 2 when nothing was drawn, 1 when one could not be
    written, 130 on Ctrl-C; a message on stderr."""
    given = parse(arguments)
    try:
        place = find_place(os.environ)
        finished = run(request_of(given, place), place)
    except (PromptError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    rank = f"rank {place.rank}: " if place.world_size > 1 else ""
    print(f"{rank}{finished.num_drawn} drawn, {finished.num_kept} kept in {given.output}")
    if finished.sheet is not None:
        print(f"{rank}contact sheet: {finished.sheet}")
    return 0


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _scale(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


if __name__ == "__main__":
    sys.exit(main())
