"""A DreamBench of the toy world: its shapes in place of the 30 subjects, and networks for them.

The folder is read by `kosmosg evaluate dreambench` as a checkout of google/dreambooth is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from megatron_kosmosg.evaluation.dreambench import SUBJECTS
from megatron_kosmosg.files import new_folder
from megatron_kosmosg.toy.scene_files import JPEG_OPTIONS
from megatron_kosmosg.toy.stand_in_networks import write_clip, write_dino
from megatron_kosmosg.toy.training.pool import to_bytes
from megatron_kosmosg.toy.world import render_batch, sample_scene, subject_scene

MANIFEST = "dreambench.json"
IMAGES, DINO, CLIP = "dreambooth", "dino.pth", "clip"
"""Below the folder: what --dreambooth, --dino and --clip name."""


@dataclass(frozen=True)
class ToyDreamBench:
    """The settings that decide the files; the same values give the same images and weights."""

    seed: int
    version: int = 1


def is_complete(folder: Path, bench: ToyDreamBench) -> bool:
    """Whether `folder` holds exactly this one, finished."""
    manifest = folder / MANIFEST
    return manifest.is_file() and json.loads(manifest.read_text()) == asdict(bench)


def write_dreambench(folder: Path, bench: ToyDreamBench) -> None:
    """Writes it beside `folder` and renames it; an older one there is replaced. Raises ValueError
    when `folder` holds anything else."""
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that are no toy DreamBench; name another folder")
    scenes = []
    for i in range(len(SUBJECTS)):
        (entity,) = sample_scene((bench.seed, i), 1, heldout=False).entities
        scenes.append(subject_scene(entity, None, (bench.seed, i)))
    pixels = to_bytes(render_batch(scenes)).permute(0, 2, 3, 1).numpy()
    with new_folder(folder, only_writer=True, replaces=True) as temporary:
        for subject, image in zip(SUBJECTS, pixels, strict=True):
            place = temporary / IMAGES / "dataset" / subject.name
            place.mkdir(parents=True)
            Image.fromarray(image).save(place / subject.file, **JPEG_OPTIONS)
        write_dino(temporary / DINO)
        write_clip(temporary / CLIP)
        (temporary / MANIFEST).write_text(json.dumps(asdict(bench)) + "\n")
