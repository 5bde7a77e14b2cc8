"""An image from text and images.

    python examples/inference/text_to_image.py kosmos-g --prompt "<image> wearing <image>" \\
        --image dog.png --image hat.png --num-images 4
"""

from __future__ import annotations

from shared import load, prompt, run, sampling


def draw(args):
    pipeline = load(args).to(args.device)
    return pipeline(**prompt(args), **sampling(args), num_images_per_prompt=args.num_images).images


def add_arguments(parser):
    parser.add_argument("--num-images", type=int, default=1, help="of the prompt (1)")


if __name__ == "__main__":
    run(draw, __doc__, add_arguments)
