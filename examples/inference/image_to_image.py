"""Starts from an image instead of noise; the prompt with its own images says what it becomes.

    python examples/inference/image_to_image.py kosmos-g --prompt "<image> at night" \\
        --image house.png --start sketch.png --strength 0.7
"""

from __future__ import annotations

from diffusers import StableDiffusionImg2ImgPipeline
from shared import embeddings, load, open_image, run, sampling


def draw(args):
    pipeline = load(args).to(args.device)
    # AutoPipelineForImage2Image does not know KosmosGPipeline; naming the class works.
    changing = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    start = open_image(args.start).resize((side, side))
    return changing(
        **embeddings(pipeline, args), **sampling(args), image=start, strength=args.strength
    ).images


def add_arguments(parser):
    parser.add_argument("--start", required=True, help="the image to start from")
    parser.add_argument("--strength", type=float, default=0.7, help="0: keep it, 1: forget it")


if __name__ == "__main__":
    run(draw, __doc__, add_arguments)
