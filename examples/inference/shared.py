"""What the examples share: the arguments of a drawing, loading a folder, saving the images.

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

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by EXIF's orientation."""


def run(
    draw: Callable[[argparse.Namespace], list[Image.Image]],
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
) -> None:
    """Parses the command line, draws, and writes the images side by side."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder of `kosmosg convert export-hf`")
    parser.add_argument("--prompt", default="", help="text with an <image> for each --image")
    parser.add_argument("--image", action="append", default=[], help="an image of the prompt")
    parser.add_argument("--negative-prompt", help="what the image should not show")
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
        images = draw(args)
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        parser.error(str(error))
    make_image_grid(images, rows=1, cols=len(images)).save(args.output)
    print(f"{len(images)} x {images[0].width} x {images[0].height}: {args.output}")


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
    if path.startswith(("http://", "https://")):
        return load_image(path, convert_method=upright_rgb)
    return upright_rgb(Image.open(path))


def upright_rgb(image: Image.Image) -> Image.Image:
    """As training reads images: upright by EXIF, white where transparent, 16 bits scaled to 8."""
    # Pillow before 12 opens a PNG of 16 bits as one of 32.
    is_16_bit = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
    if image.mode == "CMYK":
        raise ValueError("the image is CMYK")
    if image.mode in ("I", "F") and not is_16_bit:
        raise ValueError(f"the image has more than 16 bits a channel: {image.mode}")
    if is_16_bit and "transparency" in image.info:
        raise ValueError("the image has 16 bits and a transparent level")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError("the image is animated")
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(0x112, 1))
    except Exception:  # noqa: BLE001 - Pillow raises anything on a damaged note
        turn = None
    image = image if turn is None else image.transpose(turn)
    if is_16_bit:
        image = image.convert("I").point(lambda level: level / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.composite(image, white, image.getchannel("A"))
    return image.convert("RGB")


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
