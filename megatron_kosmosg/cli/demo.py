"""Opens a page in which a model draws: prompts of text and images, captions, lists of prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_dtype,
    add_stable_diffusion,
    add_tokenizer_model,
    command_parser,
    file_path,
    first_line,
    number_from_zero,
    positive_int,
    run_command,
    some_text,
)

if TYPE_CHECKING:
    from megatron_kosmosg.inference.model_source import ModelSource

LAST_PORT = 65_535
EPILOG = """\
examples:
  kosmosg demo
  kosmosg demo --model exported --dtype fp16 --offload model
  kosmosg demo --model runs/instruct --controlnet canny=control_v11p_sd15_canny --lora style

Without --model it is the small trained model of the toy world that comes with the package. The page
needs gradio: pip install 'megatron-kosmosg[web]'. Only this machine reaches it (127.0.0.1); from
another one, forward the port: ssh -L 7860:127.0.0.1:7860 HOST. --host lets everyone in who reaches
the address, and --share opens it to the internet through gradio's servers: whoever has the link can
use this machine's GPU. Ctrl-C ends it and removes what was uploaded and drawn. Exit codes: 0 ended;
2 wrong arguments, a model or port that cannot be used, no gradio; 130 Ctrl-C while it opens.
"""


def build_parser() -> CommandParser:
    """The parser of the command, with its options grouped by what they are about."""
    parser = command_parser("demo", first_line(__doc__), EPILOG)
    parser.add_argument(
        "--model",
        type=file_path,
        metavar="FOLDER",
        help="exported folder, or run or checkpoint of align or instruct (the shipped toy)",
    )
    add_stable_diffusion(parser, "whose U-Net, VAE and scheduler draw (the model's own)")
    add_tokenizer_model(parser, "of a checkpoint: as its config says")
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
        "--controlnet",
        type=some_text,
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="ControlNet for the U-Net that the page offers by this name; repeatable",
    )
    added.add_argument(
        "--control-scale",
        type=number_from_zero,
        default=1.0,
        metavar="S",
        help="what the page begins with (1)",
    )
    running = parser.add_argument_group("running")
    add_dtype(running, "all weights", None, "fp16 on a GPU, fp32 on a CPU")
    running.add_argument(
        "--device", help="as torch names it (the rank's GPU if there is one, else the CPU)"
    )
    running.add_argument(
        "--offload",
        choices=("model", "sequential"),
        help="keep weights in the CPU's memory: parts take turns on the GPU, or single layers",
    )
    serving = parser.add_argument_group("serving")
    serving.add_argument(
        "--host", type=some_text, default="127.0.0.1", help="address to listen at (127.0.0.1)"
    )
    serving.add_argument("--port", type=positive_int, default=7860, metavar="N", help="(7860)")
    serving.add_argument(
        "--share", action="store_true", help="also through a public link of gradio's servers"
    )
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line (None: the process's); contradicting options end the process."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.lora_scale and len(args.lora_scale) != len(args.lora):
        parser.error(f"{len(args.lora_scale)} --lora-scale for {len(args.lora)} --lora")
    if args.port > LAST_PORT:
        parser.error(f"--port {args.port}: the last port is {LAST_PORT}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when the page was ended, and 2, with a message on stderr, when it could not
    begin."""
    args = parse(arguments)
    return run_command(lambda: _serve(args))


def _source(args: argparse.Namespace) -> ModelSource:
    from megatron_kosmosg.inference.model_source import find_model
    from megatron_kosmosg.toy import assets

    return find_model(
        assets.path() / "kosmosg" if args.model is None else args.model,
        args.stable_diffusion,
        args.tokenizer_model,
        tuple(zip(args.lora, args.lora_scale or [1.0] * len(args.lora), strict=True)),
    )


def _serve(args: argparse.Namespace) -> int:
    import dataclasses
    from importlib.util import find_spec

    from megatron_kosmosg.config.errors import ConfigError
    from megatron_kosmosg.demo.controlnets import named_folders, opened
    from megatron_kosmosg.demo.requests import MAX_SCALE
    from megatron_kosmosg.demo.serving import check_address, serve
    from megatron_kosmosg.demo.start_values import START_VALUES, TOY_START_VALUES
    from megatron_kosmosg.launcher import ALONE

    if args.control_scale > MAX_SCALE:
        raise ConfigError(f"--control-scale {args.control_scale:g}: at most {MAX_SCALE:g} here")
    source = _source(args)
    folders = named_folders(args.controlnet)
    # What is wrong so far is said before libraries are loaded, which takes seconds.
    from megatron_kosmosg.parallel.devices import named_device

    device = named_device(args.device, ALONE)
    if find_spec("gradio") is None:
        raise ConfigError("the page needs gradio: pip install 'megatron-kosmosg[web]'")
    check_address(args.host, args.port)
    print("opening the model ...", flush=True)

    from megatron_kosmosg.demo.studio import Studio
    from megatron_kosmosg.inference.noise_schedules import SAVED
    from megatron_kosmosg.inference.open_model import open_controlnet, open_generator
    from megatron_kosmosg.parallel.platform import torch_dtype

    dtype = args.dtype or ("fp32" if device.type == "cpu" else "fp16")
    image_generator = open_generator(source, SAVED, torch_dtype(dtype), device, args.offload)
    controlnets = opened(folders, lambda folder: open_controlnet(folder, torch_dtype(dtype)))
    start = TOY_START_VALUES if args.model is None else START_VALUES
    start = dataclasses.replace(start, control_scale=args.control_scale)
    serve(
        Studio(image_generator, source, dtype, controlnets), start, args.host, args.port, args.share
    )
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
