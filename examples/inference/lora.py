"""A LoRA for Stable Diffusion 1.5 on the U-Net: without it, at half and at full strength, fused.

    python examples/inference/lora.py kosmos-g --prompt "<image> in a forest" --image dog.png \\
        --lora watercolour.safetensors

A file's tensors for CLIP's text encoder are left out with a message. Needs peft.
"""

from __future__ import annotations

from pathlib import Path

from shared import embeddings, load, run, sampling


def draw(args):
    pipeline = load(args).to(args.device)
    condition = embeddings(pipeline, args)

    def image():
        return pipeline(**condition, **sampling(args)).images[0]

    images = [image()]
    file = Path(args.lora)
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="style")
    for scale in (0.5, 1.0):
        pipeline.set_adapters("style", scale)
        images.append(image())
    pipeline.fuse_lora()  # as fast as the plain U-Net; `unfuse_lora` undoes it
    images.append(image())
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    return images


if __name__ == "__main__":
    run(draw, __doc__, lambda parser: parser.add_argument("--lora", required=True))
