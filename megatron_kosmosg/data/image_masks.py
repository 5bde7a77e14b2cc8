"""A mask file -> 255 where the entity is, 0 where it is not, mixed in between.

Programs write masks in several forms. Where a form can mean one thing only it is converted; where
it cannot, it is refused by name: a mask of labels taken for levels would be nearly empty, and the
entity blank.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops

from megatron_kosmosg.data.image_types import UnreadableImage

HALF = 128
FEW = 16
"""Levels; a soft edge has more of them, a map of labels seldom."""


def as_mask(image: Image.Image) -> Image.Image:
    """A decoded image as a mask of mode "L". Raises UnreadableImage where it is not certain what it
    means."""
    return _whole_range(_one_channel(image))


def _one_channel(image: Image.Image) -> Image.Image:
    """The image in mode "L": its levels or labels as the file has them."""
    if image.has_transparency_data:
        if np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
            raise UnreadableImage("has transparency of its own", image.mode)
        if image.mode in ("RGBA", "LA"):
            image = image.convert(image.mode[:-1])
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        # Labels, or 8 bits in 16.
        shift = 8 if levels.max(initial=0) > 255 else 0
        return Image.fromarray((levels >> shift).astype(np.uint8))
    if image.mode in ("P", "PA"):
        indexes = image if image.mode == "P" else image.getchannel("P")
        used = [index for index, count in enumerate(indexes.histogram()) if count]
        colours = image.getpalette("RGB") or []
        shown = [tuple(colours[3 * index : 3 * index + 3]) for index in used]
        if any(len(set(colour)) > 1 for colour in shown):
            # One colour on black: the palette of a program that paints labels.
            if len(used) == 2 and shown[0] == (0, 0, 0):
                levels = np.where(np.asarray(indexes) == used[1], 255, 0)
                return Image.fromarray(levels.astype(np.uint8))
            raise UnreadableImage("has a palette of colours", f"{len(used)} in use")
    red, green, blue = image.convert("RGB").split()
    if any(ImageChops.difference(red, other).getbbox() for other in (green, blue)):
        raise UnreadableImage("has colours", image.mode)
    return red


def _whole_range(levels: Image.Image) -> Image.Image:
    counts = levels.histogram()
    used = [level for level, count in enumerate(counts) if count]
    if used == [0]:
        raise UnreadableImage("is empty")
    if used == [1] or used[-1] < 255 and len(used) == 2 and used[0] == 0:
        # Two levels, such as 0 and 1 or 0 and a class: it is there or not.
        return levels.point([0] + [255] * 255)
    low, high = sum(counts[1:HALF]), sum(counts[HALF:])
    if used[-1] < HALF or len(used) <= FEW and low > high:
        shown = ", ".join(map(str, used[:6])) + (", ..." if len(used) > 6 else "")
        raise UnreadableImage("holds labels, not levels from 0 to 255", f"values {shown}")
    return levels
