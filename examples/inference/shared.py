"""What the examples share: the arguments of a drawing, loading a folder, saving the pictures.

Needs diffusers and transformers, and the package or the folder's own two .py files: those run only
with --trust-remote-code, so read them before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image, make_image_grid
from PIL import Image


def run(
    draw: Callable[[argparse.Namespace], list[Image.Image]],
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
) -> None:
    """Parses the command line, draws, and writes the pictures side by side."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder of `kosmosg convert export-hf`")
    parser.add_argument("--prompt", default="", help="text with an <image> for each --image")
    parser.add_argument("--image", action="append", default=[], help="a picture of the prompt")
    parser.add_argument("--negative-prompt", help="what the picture should not show")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler (50)")
    parser.add_argument("--guidance-scale", type=float, default=6.0, help="1 or less: none (6)")
    parser.add_argument("--seed", type=int, default=0, help="of the start noise (0)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the two .py files in the folder instead of the installed package's pipeline",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"as torch names it ({device})")
    parser.add_argument(
        "--output", type=Path, default=Path("picture.png"), help="file (picture.png)"
    )
    add_arguments(parser)
    args = parser.parse_args()
    try:
        pictures = draw(args)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    make_image_grid(pictures, rows=1, cols=len(pictures)).save(args.output)
    print(f"{len(pictures)} x {pictures[0].width} x {pictures[0].height}: {args.output}")


def load(
    args: argparse.Namespace, dtype: torch.dtype = torch.float32, **parts: Any
) -> DiffusionPipeline:
    """The pipeline of the folder; `parts` replace components."""
    if not args.folder.is_dir():
        raise FileNotFoundError(f"no folder {args.folder}")
    # The oldest diffusers of those that can be used ignores the newer name, `dtype`.
    if args.trust_remote_code:
        return DiffusionPipeline.from_pretrained(
            args.folder, trust_remote_code=True, torch_dtype=dtype, **parts
        )
    try:
        from megatron_kosmosg import KosmosGPipeline
    except ImportError:
        raise ValueError(
            "megatron_kosmosg is not installed; read the two .py files in the folder and give "
            "--trust-remote-code to run those instead"
        ) from None
    return KosmosGPipeline.from_pretrained(args.folder, torch_dtype=dtype, **parts)


def prompt(args: argparse.Namespace) -> dict[str, Any]:
    """The prompt as arguments of a call or of `encode_prompt`."""
    return {
        "prompt": args.prompt,
        "images": [open_image(path) for path in args.image],
        "negative_prompt": args.negative_prompt,
    }


def open_image(path: str) -> Image.Image:
    """RGB of a file or an address."""
    return load_image(path, convert_method=over_white)


def over_white(picture: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as people see it and as in training."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, (255, 255, 255))
    return Image.composite(picture.convert("RGB"), white, picture.getchannel("A"))


def embeddings(pipeline: DiffusionPipeline, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The prompt as what any pipeline of Stable Diffusion 1.5 takes."""
    embeds, negative = pipeline.encode_prompt(**prompt(args))
    return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the sampler; the noise is drawn on the CPU, equal on every device."""
    return {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "generator": torch.Generator().manual_seed(args.seed),
    }
