"""The ControlNets that the page offers, and what the control image of each kind is.

None of these images is made from a photograph here: what comes up is what the network sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.demo.requests import NONE
from megatron_kosmosg.files import fingerprint
from megatron_kosmosg.inference.model_source import check_controlnet

if TYPE_CHECKING:
    from diffusers import ControlNetModel

CONTROL_IMAGES = {
    "canny": "edges, as thin white lines on black",
    "mlsd": "straight edges, as white lines on black",
    "scribble": "a drawing in thick white lines on black",
    "softedge": "soft edges, bright on black",
    "lineart": "a line drawing, white on black",
    "openpose": "a skeleton of coloured limbs on black",
    "seg": "areas in the colours of ADE20K's classes",
    "depth": "depth, where near is bright",
    "normal": "normals as colours",
    "shuffle": "an image whose colours and textures are taken, not its shapes",
    "ip2p": "the image that is to change as the prompt says",
    "tile": "an image whose details are drawn anew",
}
"""{kind, as in the names of the published ones: its control image}."""


@dataclass(frozen=True)
class NamedControlNet:
    """A ControlNet that the command line names."""

    model: ControlNetModel
    digest: str
    """Fingerprint of its folder."""


def control_image_of(name: str) -> str:
    """The kind of image that a ControlNet wants, as far as its name tells."""
    kinds = (kind for kind in CONTROL_IMAGES if kind in name.lower())
    return CONTROL_IMAGES.get(next(kinds, ""), "the image that it was trained on")


def named_folders(options: Sequence[str]) -> dict[str, Path]:
    """The folders by their names, from arguments `NAME=FOLDER` or `FOLDER`, which is its own name.
    Raises ConfigError."""
    found: dict[str, Path] = {}
    for words in options:
        name, equals, folder = words.partition("=")
        if not equals or Path(words).is_dir():
            name, folder = Path(words).resolve().name, words
        if not name.strip() or not folder:
            raise ConfigError(f"--controlnet {words}: give NAME=FOLDER")
        if name == NONE or name in found:
            raise ConfigError(f"--controlnet {words}: the name {name} is taken; give NAME=FOLDER")
        found[name] = Path(folder)
        check_controlnet(found[name])
    return found


def opened(
    folders: dict[str, Path], opening: Callable[[Path], ControlNetModel]
) -> dict[str, NamedControlNet]:
    """The ControlNets of the folders, opened, by their names."""
    return {
        name: NamedControlNet(opening(folder), fingerprint(folder))
        for name, folder in folders.items()
    }
