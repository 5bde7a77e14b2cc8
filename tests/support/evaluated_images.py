"""Stand-ins for the images that are scored, in the forms of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_kosmosg.evaluation.dreambench import SUBJECTS


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
    annotations = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i % 3, "caption": f"a red circle {i}"} for i in range(4)],
    }
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(annotations))
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
