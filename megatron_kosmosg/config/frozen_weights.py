"""Which weights a folder of frozen networks has, told by the names of its files.

Stable Diffusion is published with weights of several variants side by side, or of half precision
(`fp16`) alone; diffusers and transformers want to be told which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

DIFFUSERS, TRANSFORMERS = ("diffusion_pytorch_model",), ("model", "pytorch_model")
"""What the two libraries call the weights of one network, before the suffix."""
_PARTS = {
    "model.diffusion.path": {"unet": DIFFUSERS, "vae": DIFFUSERS, "scheduler": ()},
    "model.clip_text.path": {"text_encoder": TRANSFORMERS},
}
"""{setting: {folder inside: names of its weights}}"""


def weights_variant(folder: Path, names: tuple[str, ...] = DIFFUSERS) -> str | None:
    """The variant to load, None for the weights that need no name; those win over every variant,
    fp16 over the others. FileNotFoundError where the folder has no weights."""
    named = rf"(?:{'|'.join(names)})(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.(?:safetensors|bin)"
    matches = [re.fullmatch(named, path.name) for path in folder.iterdir()]
    found = {match[1] or match[2] for match in matches if match}
    if not found:
        raise FileNotFoundError(f"{folder} has no weights ({names[0]}.safetensors)")
    return None if None in found else min(found, key=lambda variant: (variant != "fp16", variant))


def missing_parts(key: str, folder: Path) -> Iterator[str]:
    """What a folder of frozen networks, the value of the setting `key`, lacks; nothing for
    settings that name other folders."""
    for part, names in _PARTS.get(key, {}).items():
        if not (folder / part).is_dir():
            yield f"{key}={folder} has no folder {part}; give a Stable Diffusion in diffusers' form"
        elif not any((folder / part).glob("*config.json")):
            yield f"{key}={folder}: {part} has no config.json; is the download complete?"
        elif names:
            try:
                weights_variant(folder / part, names)
            except FileNotFoundError:
                yield (
                    f"{key}={folder}: {part} has no weights ({names[0]}.safetensors, also as "
                    f"variant fp16, or .bin); is the download complete?"
                )
