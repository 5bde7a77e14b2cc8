"""Half the memory or less: bf16 or fp16 weights, VAE in tiles, parts on the device in turn.

    python examples/inference/low_precision.py kosmos-g --prompt "<image> on a beach" \\
        --image dog.png --dtype fp16 --offload --height 1024 --width 1024

--offload needs accelerate and a GPU: language model, aligner, U-Net and VAE take turns on it.
"""

from __future__ import annotations

import torch
from shared import load, prompt, run, sampling

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def draw(args):
    pipeline = load(args, DTYPES[args.dtype])
    if args.offload:
        pipeline.enable_model_cpu_offload(device=args.device)
    else:
        pipeline.to(args.device)
    pipeline.vae.enable_tiling()
    pipeline.vae.enable_slicing()
    size = {"height": args.height, "width": args.width}
    images = pipeline(**prompt(args), **sampling(args), **size).images
    if args.device.startswith("cuda"):
        print(f"peak on the device: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return images


def add_arguments(parser):
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of all weights (bf16)")
    parser.add_argument("--offload", action="store_true", help="parts take turns on the GPU")
    parser.add_argument("--height", type=int, help="both or none; default: the U-Net's own size")
    parser.add_argument("--width", type=int, help="as --height")


if __name__ == "__main__":
    run(draw, __doc__, add_arguments)
