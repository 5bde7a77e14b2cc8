"""Another checkpoint of Stable Diffusion 1.5's shape in place of the U-Net and VAE, beside ours.

    python examples/inference/other_checkpoint.py kosmos-g --prompt "<image> in a castle" \\
        --image dog.png --checkpoint dreamlike.safetensors

Any fine-tuned version works as far as it reads the final layer of CLIP's text encoder; those tuned
with clip_skip=2 expect another layer.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from shared import embeddings, load, run, sampling

PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


def draw(args):
    pipeline = load(args).to(args.device)
    condition = embeddings(pipeline, args)
    images = pipeline(**condition, **sampling(args)).images
    for name, kind in PARTS.items():
        if Path(args.checkpoint).is_file():
            part = kind.from_single_file(args.checkpoint)
        else:
            part = kind.from_pretrained(args.checkpoint, subfolder=name)
        setattr(pipeline, name, part.to(args.device))
    return [*images, *pipeline(**condition, **sampling(args)).images]


if __name__ == "__main__":
    run(
        draw,
        __doc__,
        lambda parser: parser.add_argument(
            "--checkpoint", required=True, help="a diffusers folder or one .safetensors file"
        ),
    )
