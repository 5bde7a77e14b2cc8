"""The subject of the prompt in a given pose, outline or depth: a ControlNet beside the U-Net.

    python examples/inference/controlnet.py kosmos-g --prompt "<image> dancing" --image robot.png \\
        --controlnet lllyasviel/control_v11p_sd15_openpose --control-image pose.png

Without --controlnet an untrained one is made of the U-Net; its outputs are zero, so it only shows
the way.
"""

from __future__ import annotations

from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from shared import embeddings, load, open_image, run, sampling

EMBEDDING_CHANNELS = (16, 32, 96, 256)
"""Of Stable Diffusion 1.5, whose VAE halves an image three times."""


def draw(args):
    pipeline = load(args).to(args.device)
    if args.controlnet:
        control = ControlNetModel.from_pretrained(args.controlnet)
    else:
        halvings = len(pipeline.vae.config.block_out_channels) - 1
        control = ControlNetModel.from_unet(
            pipeline.unet, conditioning_embedding_out_channels=EMBEDDING_CHANNELS[: 1 + halvings]
        )
    controlled = StableDiffusionControlNetPipeline.from_pipe(
        pipeline, controlnet=control.to(args.device)
    )
    image = open_image(args.control_image)
    if args.image_size:
        image = image.resize((args.image_size, args.image_size))
    return controlled(**embeddings(pipeline, args), **sampling(args), image=image).images


def add_arguments(parser):
    parser.add_argument("--controlnet", help="a ControlNet for Stable Diffusion 1.5")
    parser.add_argument(
        *("--control-image", "--control"),
        required=True,
        help="its image; the result has its size",
    )
    parser.add_argument(
        "--image-size", "--size", type=int, help="side to which that image is resized"
    )


if __name__ == "__main__":
    run(draw, __doc__, add_arguments)
