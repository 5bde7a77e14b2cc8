"""Files of the networks that score images, with random weights under the published names, and
stand-ins for the images that they score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel

from megatron_kosmosg.evaluation.dino import DinoViTS16
from megatron_kosmosg.evaluation.dreambench import SUBJECTS
from megatron_kosmosg.evaluation.inception import FidInception
from megatron_kosmosg.toy import assets

TOKENIZER = Path(assets.__file__).parent / "stable-diffusion" / "tokenizer"


def write_dino(path: Path, seed: int = 1) -> Path:
    """A file of ViT-S/16's size, whose features differ from image to image."""
    torch.manual_seed(seed)
    model = DinoViTS16()
    for name, values in model.named_parameters():
        if values.dim() > 1:
            nn.init.normal_(values, std=0.05)
        elif "norm" in name and name.endswith("weight"):
            nn.init.uniform_(values, 0.5, 1.5)
        else:
            nn.init.normal_(values, std=0.02)
    torch.save(model.state_dict(), path)
    return path


def write_inception(path: Path, seed: int = 2) -> Path:
    """A file of the published size, whose activations neither die nor grow."""
    torch.manual_seed(seed)
    model = FidInception()
    for values in model.parameters():
        if values.dim() > 1:
            nn.init.normal_(values, std=(2 / values[0].numel()) ** 0.5)
    torch.save(model.state_dict(), path)
    return path


def write_clip(folder: Path, seed: int = 3) -> Path:
    """A tiny model that sees what B/32 sees, with the toy's tokenizer."""
    shutil.copytree(TOKENIZER, folder)
    vocabulary = len((folder / "vocab.json").read_text().split('":')) - 1
    torch.manual_seed(seed)
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(
        text_config=text
        | dict(
            vocab_size=vocabulary,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        ),
        vision_config=text | dict(image_size=224, patch_size=32),
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def write_dreambooth(folder: Path) -> Path:
    """A folder as google/dreambooth's checkout, with noise: two images a subject."""
    images = odd_images(6, seed=5)
    for i, subject in enumerate(SUBJECTS):
        place = folder / "dataset" / subject.name
        place.mkdir(parents=True)
        images[i % 6].resize((40, 40)).save(place / subject.file)
        images[(i + 1) % 6].resize((40, 44)).save(place / "99.jpg")
    return folder


def write_coco(folder: Path) -> Path:
    """A folder as COCO 2014's, with noise: three images and four captions."""
    (folder / "val2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    names = [f"COCO_val2014_{i:012d}.jpg" for i in range(3)]
    for name, image in zip(names, odd_images(3, seed=6), strict=True):
        image.resize((60, 50)).save(folder / "val2014" / name)
    said = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i % 3, "caption": f"a red circle {i}"} for i in range(4)],
    }
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(said))
    return folder


def odd_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Smooth noise in sizes of either orientation, some of whose crops fall between pixels."""
    rng = np.random.default_rng(seed)
    sizes = [(224, 227), (640, 427), (301, 300), (256, 259), (97, 130), (512, 512)]
    images = []
    for i in range(count):
        small = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize(sizes[i % len(sizes)], Image.Resampling.BICUBIC)
        noise = rng.integers(-9, 9, np.asarray(image).shape)
        images.append(Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)))
    return images
