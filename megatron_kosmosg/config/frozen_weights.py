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
_WHOLE_MODEL = (".safetensors", ".ckpt")
_REWRITE = (
    'python -c "from diffusers import StableDiffusionPipeline as P; '
    "P.{reader}('{path}', {settings}safety_checker=None).save_pretrained('NEW')\""
)


def weights_variant(folder: Path, names: tuple[str, ...] = DIFFUSERS) -> str | None:
    """The variant to load, None for the weights that need no name; those win over every variant,
    fp16 over the others. None, too, where there are no weights: a rehearsal opens folders of
    configurations alone, and otherwise the library that reads says that they are missing."""
    found = _variants(folder, names)
    if not found or None in found:
        return None
    return min(found, key=lambda variant: (variant != "fp16", str(variant)))


def _variants(folder: Path, names: tuple[str, ...]) -> set[str | None]:
    """The variants ("fp16", ...; None for the plain one) of the named weights that the folder
    holds."""
    named = rf"(?:{'|'.join(names)})(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.(?:safetensors|bin)"
    matches = [re.fullmatch(named, path.name) for path in folder.iterdir()]
    return {match[1] or match[2] for match in matches if match}


def one_file_advice(path: str) -> str | None:
    """What to do with a whole Stable Diffusion in one file; None where `path` is none."""
    if not path.endswith(_WHOLE_MODEL) or not Path(path).is_file():
        return None
    command = _REWRITE.format(reader="from_single_file", path=path, settings="")
    return (
        "is one file; a folder in diffusers' layout is needed. Make it once (it asks the internet "
        f"for the model's settings): {command}, and give NEW"
    )


def pickles_advice(part: Path) -> str | None:
    """What to do with a part of a Stable Diffusion that has pickles alone, where only safetensors
    are read; None where it has no pickles."""
    if not any(part.glob("*.bin")):
        return None
    command = _REWRITE.format(
        reader="from_pretrained", path=part.parent, settings="use_safetensors=False, "
    )
    return (
        "has its weights as pickles (.bin) alone; where you trust them, write the folder once as "
        f"safetensors: {command}"
    )


def missing_parts(key: str, folder: Path) -> Iterator[str]:
    """What a folder of frozen networks, the value of the setting `key`, lacks; nothing for
    settings that name other folders."""
    for part, names in _PARTS.get(key, {}).items():
        if not (folder / part).is_dir():
            yield f"{key}={folder} has no folder {part}; give a Stable Diffusion in diffusers' form"
        elif not any((folder / part).glob("*config.json")):
            yield f"{key}={folder}: {part} has no config.json; is the download complete?"
        elif names and not _variants(folder / part, names):
            yield (
                f"{key}={folder}: {part} has no weights ({names[0]}.safetensors, also as variant "
                "fp16, or .bin); is the download complete?"
            )
