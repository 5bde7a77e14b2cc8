"""The model as a node, and the node that reads prompts with it."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import folder_paths
import numpy as np
import torch
from PIL import Image

from megatron_kosmosg.files import fingerprint

CATEGORY = "conditioning/KOSMOS-G"
MODEL = "KOSMOSG_MODEL"
FOLDER_NAME = "kosmosg"
"""Of ComfyUI's models; extra_model_paths.yaml may name more places for it."""
MAX_IMAGES = 32
"""Sockets. An image takes 66 of the 2,048 positions of the paper's model, so that 31 fit."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

folder_paths.add_model_folder_path(FOLDER_NAME, str(Path(folder_paths.models_dir, FOLDER_NAME)))


def model_folders() -> dict[str, Path]:
    """Exported folders and runs, by name. A workflow chooses among them, and gives no path."""
    found: dict[str, Path] = {}
    for place in map(Path, folder_paths.get_folder_paths(FOLDER_NAME)):
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            if folder.is_dir() and not folder.name.startswith("."):
                found.setdefault(folder.name, folder)
    return found


class LoadModel:
    """Opens language model and aligner of an exported folder or of a training run."""

    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("kosmosg",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "KOSMOS-G's language model and aligner, from a folder below models/kosmosg."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": (sorted(model_folders()), {"tooltip": "A folder below models/kosmosg."}),
                "dtype": (
                    ["auto", *DTYPES],
                    {"tooltip": "Of the weights; auto: fp16 where the device computes in it."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, model, dtype):
        folder = model_folders().get(model)
        return fingerprint(folder) if folder is not None else ""

    def load(self, model, dtype):
        # Not at the start of ComfyUI: diffusers and transformers take seconds to import.
        from megatron_kosmosg.inference.condition_encoder import ConditionEncoder

        device = comfy.model_management.text_encoder_device()
        resting = comfy.model_management.text_encoder_offload_device()
        if dtype == "auto":
            halves = comfy.model_management.should_use_fp16(device)
            dtype = "fp16" if halves and device.type != "cpu" else "fp32"
        return (ConditionEncoder(model_folders()[model], DTYPES[dtype], device, resting),)


class EncodePrompt:
    """A text with images in it -> positive and negative conditioning."""

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    FUNCTION = "encode"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Write <image> in the text where each connected image goes, in their order. Use both "
        "outputs: the negative of CLIP's empty prompt does not fit KOSMOS-G's positive."
    )

    @classmethod
    def INPUT_TYPES(cls):
        words = {"multiline": True, "dynamicPrompts": True}
        images = (f"image{number}" for number in range(1, MAX_IMAGES + 1))
        return {
            "required": {
                "kosmosg": (MODEL,),
                "text": ("STRING", {**words, "default": "<image> in the snow"}),
                "negative": ("STRING", {**words, "default": ""}),
            },
            # Each has a size of its own; web/growing_images.js shows one more than are connected.
            "optional": dict.fromkeys(images, ("IMAGE",)),
        }

    def encode(self, kosmosg, text, negative, **images):
        ordered = sorted(images.items(), key=lambda item: int(item[0].removeprefix("image")))
        opened = [
            image for _, batch in ordered if batch is not None for image in pillow_images(batch)
        ]
        positive, null = kosmosg.encode(text, opened, negative)
        return ([[positive, {}]], [[null, {}]])


def pillow_images(batch: torch.Tensor) -> list[Image.Image]:
    """The images of an IMAGE: [b, h, w, 3 or 4] in 0 to 1, all of one size."""
    values = (batch.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(image)) for image in values]
