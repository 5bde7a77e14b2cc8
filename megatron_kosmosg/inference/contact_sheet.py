"""One image that shows prompts beside what was drawn: words, the prompt's images, results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from megatron_kosmosg.inference.sheet_font import Font, readable

FONT_SIZE, LINE_PIXELS, GAP, MIN_WIDTH = 13, 18, 6, 560
INK, FAINT, RULE = (20, 20, 20), (110, 110, 110), (205, 205, 205)


@dataclass(frozen=True)
class SheetRow:
    """One prompt. Every image has a label above it."""

    text: str
    prompt_images: Sequence[tuple[str, Image.Image]]
    results: Sequence[tuple[str, Image.Image]]


def contact_sheet(rows: Sequence[SheetRow], cell: int) -> Image.Image:
    """The sheet; results start in the same column in every row.

    Args:
        cell: pixels per side of the square that an image is fitted into, its proportions kept.
    """
    step = cell + GAP
    before = max(len(row.prompt_images) for row in rows) * step
    before += 2 * GAP if before else 0
    width = GAP + before + max(len(row.results) for row in rows) * step
    width = max(width, MIN_WIDTH)
    texts = [_lines(row.text or "(no words)", width - 2 * GAP) for row in rows]
    heights = [len(lines) * LINE_PIXELS + LINE_PIXELS + cell + 3 * GAP for _, lines in texts]
    sheet = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, (font, lines), height in zip(rows, texts, heights, strict=True):
        y = top + GAP
        for line in lines:
            draw.text((GAP, y), line, fill=INK, font=font)
            y += LINE_PIXELS
        for start, images in ((GAP, row.prompt_images), (GAP + before, row.results)):
            for j, (label, image) in enumerate(images):
                x = start + j * step
                place = (x + cell / 2, y + LINE_PIXELS / 2)
                labelled, label = readable(label, FONT_SIZE)
                draw.text(place, label, fill=FAINT, font=labelled, anchor="mm")
                fitted = _fit(image, cell)
                offset = ((cell - fitted.width) // 2, (cell - fitted.height) // 2)
                sheet.paste(fitted, (x + offset[0], y + LINE_PIXELS + offset[1]))
        top += height
        draw.line([(0, top), (width, top)], fill=RULE)
    return sheet


def _fit(image: Image.Image, cell: int) -> Image.Image:
    factor = cell / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _lines(text: str, width: int) -> tuple[Font, list[str]]:
    font, text = readable(text, FONT_SIZE)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return font, lines
