"""Trains the frozen parts that the toy world ships with, and writes them as package data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    command_parser,
    file_path,
    positive_int,
    run_command,
)
from megatron_kosmosg.toy import assets

PARTS = ("tokenizer", "vae", "text", "clip", "decoder", "export")
ITERATIONS = {"vae": 2600, "text": 700, "clip": 850, "decoder": 5500}
EPILOG = """\
parts, in the order of `all`:
  tokenizer  ASSETS/sentencepiece.model, and CLIP's vocabulary in RUN/stable-diffusion/tokenizer
  vae        AutoencoderKL into RUN/vae_fp32                       (about 1000 CPU seconds)
  text       CLIPTextModel into RUN/stable-diffusion/text_encoder  (100)
  clip       CLIPVisionModel into ASSETS/clip-vision               (300)
  decoder    UNet2DConditionModel, averaged weights in RUN/decoder.pt; needs vae and text (1500)
  export     RUN -> ASSETS/stable-diffusion in fp16; needs vae, text and decoder

Each part continues from its checkpoint in RUN, prints its progress with the seconds left, and
leaves a finished part as it is. `export` also works while the decoder is being trained.
"""


def build_parser() -> CommandParser:
    """The parser of the command: which parts are trained, and what they are made of."""
    parser = command_parser("toy train-assets", __doc__, EPILOG)
    parser.add_argument("part", choices=(*PARTS, "all"), help="what to make; see below")
    parser.add_argument(
        "--run",
        type=file_path,
        default=Path("runs/toy_assets"),
        metavar="RUN",
        help="working folder",
    )
    parser.add_argument(
        "--assets",
        type=file_path,
        default=assets.path(),
        metavar="FOLDER",
        help="where the shipped files go (package)",
    )
    parser.add_argument(
        "--train-iters", type=positive_int, metavar="N", help="updates of this one part"
    )
    parser.renamed("--steps", "--train-iters")
    parser.add_argument(
        "--latent-files", type=positive_int, default=40, metavar="N", help="2048 scenes each (40)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when the parts are made, and 2, with a message on stderr, when one that is needed
    is missing."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.train_iters is not None and args.part not in ITERATIONS:
        parser.error(f"--train-iters {args.train_iters} goes with one of {', '.join(ITERATIONS)}")
    return run_command(
        lambda: _train(args),
        "interrupted; the same command goes on from here",
        "--run or --assets",
    )


def _train(args: argparse.Namespace) -> int:
    import torch

    from megatron_kosmosg.config.overwrites import refuse_to_overwrite
    from megatron_kosmosg.toy.training.parts import Parts

    torch.set_num_threads(1)
    iterations = dict(ITERATIONS)
    if args.train_iters is not None:
        iterations[args.part] = args.train_iters
    refuse_to_overwrite([args.assets], [args.run], "--assets")
    parts = Parts(args.run, args.assets, iterations, args.latent_files)
    for name in PARTS if args.part == "all" else (args.part,):
        getattr(parts, name)()
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
