"""Generated images as PNG files that say how they were made, and whether one is finished.

A file appears under its name only when it is whole. Its text chunks are `prompt`,
`negative_prompt`, `seed`, `settings` (JSON) and `settings_hash`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from megatron_kosmosg.files import replacing
from megatron_kosmosg.foreign_files import parse_json
from megatron_kosmosg.inference.image_plan import PlannedImage
from megatron_kosmosg.inference.prompt_records import PromptError


def write_image(image: Image.Image, planned: PlannedImage, folder: Path) -> Path:
    """The file in `folder`, which is made if need be; an older one of that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [part if isinstance(part, str) else part.name for part in planned.record.content]
    texts = {
        "prompt": planned.record.text,
        "negative_prompt": planned.settings["negative_prompt"],
        "seed": str(planned.settings["seed"]),
        "settings": json.dumps(planned.settings | {"shown": shown}, ensure_ascii=False),
        "settings_hash": planned.settings_hash,
        "Software": "megatron-kosmosg",
    }
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    path = folder / planned.file_name
    save_atomically(image, path, pnginfo=chunks)
    return path


def save_atomically(image: Image.Image, path: Path, **options: object) -> None:
    """Writes a PNG, which appears whole or not at all."""
    with replacing(path) as temporary:
        image.save(temporary, "PNG", **options)


def is_finished(planned: PlannedImage, folder: Path) -> bool:
    """True if `folder` holds this image, whole and made with exactly these settings."""
    try:
        with Image.open(folder / planned.file_name) as image:
            if image.info.get("settings_hash") != planned.settings_hash:
                return False
            image.verify()  # the checksums of its chunks
            return True
    except (OSError, SyntaxError, ValueError):
        return False


def read_settings(path: Path) -> dict[str, Any]:
    """What `write_image` wrote: `prompt` and the fields of its `settings`.

    Raises PromptError for any other file.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            texts = dict(image.info)
        settings = parse_json(str(texts["settings"]))
    except (OSError, SyntaxError, ValueError, KeyError) as error:
        raise PromptError(
            f"{path.name} says no settings: it is no PNG that kosmosg has drawn"
        ) from error
    if not isinstance(settings, dict) or not isinstance(texts.get("prompt"), str):
        raise PromptError(f"{path.name} says no settings: they are damaged")
    return settings | {"prompt": texts["prompt"]}
