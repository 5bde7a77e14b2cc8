#!/usr/bin/env python3
"""Words for images, by the language model of an exported folder: greedy or beam search.

Needs torch, transformers and Pillow only, and no remote code. Stock Kosmos-2 hands several images
to the wrong beams (it repeats their features in another order than the rows), without an error. The
embedded prompt is therefore built first here, which is right for any number of images and beams.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

PLACEHOLDER = "<image>"


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


class Captioner:
    """The language model of a folder written by `kosmosg convert export-hf` or `export-mllm`."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        # export-hf writes a folder per part, export-mllm all files into one.
        parts = ("mllm", "tokenizer", "mllm_image_processor")
        model, tokenizer, images = parts if (folder / "mllm").is_dir() else ("", "", "")
        self.model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
            folder, subfolder=model, dtype=torch.float32 if device == "cpu" else torch.bfloat16
        ).to(device)
        # transformers before 5.23 takes the resampler's queries for text, without an error.
        self.model.image_to_text_projection.x_attn.is_causal = False
        self.tokenizer = AutoTokenizer.from_pretrained(folder, subfolder=tokenizer)
        self.images = AutoImageProcessor.from_pretrained(folder, subfolder=images)

    @torch.no_grad()
    def continue_prompt(
        self, prompt: str, images: Sequence[Image.Image], **generation: object
    ) -> list[str]:
        """The words that follow `prompt`, best first; `<image>` stands where an image goes.

        generation: what `transformers`' generate takes (num_beams, max_new_tokens, ...).
        """
        embeds = self.embed(prompt, images)
        ids = self.model.text_model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            **generation,
        )
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def embed(self, prompt: str, images: Sequence[Image.Image]) -> torch.Tensor:
        """[1, s, h]: the embedded prompt, images in place, before scaling and positions."""
        fragments = prompt.split(PLACEHOLDER)
        if len(fragments) - 1 != len(images):
            raise ValueError(
                f"{len(fragments) - 1} {PLACEHOLDER} in the prompt, {len(images)} image(s)"
            )
        model, slots = self.model, self.model.config.latent_query_num
        start, end = self.tokenizer.convert_tokens_to_ids(["<image>", "</image>"])
        ids, is_slot = [self.tokenizer.bos_token_id], [False]
        for i, fragment in enumerate(fragments):
            if i:
                ids += [start] * (1 + slots) + [end]
                is_slot += [False] + [True] * slots + [False]
            # Names of special tokens in a text are text like any other.
            words = self.tokenizer.encode(
                fragment, add_special_tokens=False, split_special_tokens=True
            )
            ids += words
            is_slot += [False] * len(words)
        embeds = model.text_model.get_input_embeddings()(torch.tensor(ids, device=model.device))
        if images:
            size = model.config.vision_config.image_size
            squares = [resize_and_crop(upright_rgb(image), size) for image in images]
            pixels = self.images(
                squares, do_resize=False, do_center_crop=False, return_tensors="pt"
            )
            features = self._features(pixels["pixel_values"].to(model.device, model.dtype))
            embeds[torch.tensor(is_slot, device=model.device)] = features.flatten(0, 1)
        return embeds[None]

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[n, slots, h] for pixel values [n, 3, size, size]."""
        patches = self.model.vision_model(pixel_values)[0]
        patches = self.model.vision_model.model.post_layernorm(patches)
        patches = torch.nn.functional.normalize(patches, dim=-1)
        return self.model.image_to_text_projection(patches)[0]


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


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of side `size`, as in training; image processors round otherwise."""
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(width, height) > 4 * size:  # mostly cut off: only what is kept is resized
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return image.resize((size, size), Image.Resampling.BICUBIC, box)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def main() -> int:
    """0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python examples/inference/caption_image.py --model exported "
        "--image cat.png --beams 3",
    )
    parser.add_argument("--model", type=Path, required=True, help="exported folder")
    parser.add_argument(
        "--image", type=Path, action="append", required=True, metavar="FILE", help="repeatable"
    )
    parser.add_argument(
        "--prompt", help="words around the images, with <image> for each (default: images only)"
    )
    parser.add_argument("--beams", type=int, default=1, help="1 is greedy search (default)")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="(40)")
    parser.add_argument("--device", default="cpu", help="as torch names it (cpu)")
    args = parser.parse_args()
    prompt = PLACEHOLDER * len(args.image) if args.prompt is None else args.prompt
    try:
        images = [Image.open(path) for path in args.image]
        captioner = Captioner(args.model, args.device)
        words = captioner.continue_prompt(
            prompt,
            images,
            num_beams=args.beams,
            num_return_sequences=args.beams,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
        )
    except (OSError, SyntaxError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in words:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
