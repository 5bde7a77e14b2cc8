"""Rows of small images on one grid, for people who would rather look than read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

HEADING_PIXELS = 20
GAP = 4
"""Pixels between cells, and around all of them."""


def to_image(pixels: torch.Tensor) -> Image.Image:
    """The RGB image of `pixels` [3, height, width] in [-1, 1]."""
    array = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).numpy())


def image_grid(
    rows: Sequence[Sequence[Image.Image | None]],
    cell: int,
    headings: Sequence[str] = (),
) -> Image.Image:
    """One grid with a row per entry of `rows`; None leaves its cell white.

    Args:
        cell: pixels per side of a cell; smaller images are enlarged to it.
        headings: short words above the columns.
    """
    columns = max(len(row) for row in rows)
    step, top = cell + GAP, HEADING_PIXELS if headings else 0
    grid = Image.new("RGB", (columns * step + GAP, top + len(rows) * step + GAP), "white")
    for j, heading in enumerate(headings):
        place = (GAP + j * step + cell / 2, top / 2 + GAP / 2)
        ImageDraw.Draw(grid).text(place, heading, fill="black", anchor="mm", font_size=12)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if image is not None:
                resized = image.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
                grid.paste(resized, (GAP + j * step, top + GAP + i * step))
    return grid
