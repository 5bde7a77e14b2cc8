"""In which font a sheet's words can be read, and how letters are spelled that no font here has.

Pillow brings a font of ASCII letters alone; it draws an empty box for each of the others.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FILES = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
)
"""Fonts with many letters, which Pillow looks for where the system keeps its fonts."""
NO_CHARACTER = "\uffff"
"""Never a letter: every font draws its box."""


def readable(text: str, size: int) -> tuple[Font, str]:
    """The font of this machine that has the most letters of `text`, and the text as it is drawn:
    letters that the font lacks lose their accents, or become `\\u7ea2`."""
    text = unicodedata.normalize("NFC", text)
    chosen: Font = ImageFont.load_default(size)
    missing = _missing(chosen, text)
    for font in _others(size) if missing else ():
        left = _missing(font, text)
        if len(left) < len(missing):
            chosen, missing = font, left
        if not missing:
            break
    return chosen, "".join(
        _spelled(letter, chosen) if letter in missing else letter for letter in text
    )


def _others(size: int) -> Iterator[Font]:
    matplotlib = find_spec("matplotlib")  # brings DejaVu Sans; it is not imported
    if matplotlib is not None and matplotlib.origin is not None:
        shipped = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / FILES[0]
        if shipped.is_file():
            yield ImageFont.truetype(shipped, size)
    for name in FILES:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:
            continue


def _missing(font: Font, text: str) -> set[str]:
    """The letters without a picture. Layout draws a lone mark on a circle, box or not: for those
    the letter that they belong to answers."""
    box = _pixels(font, NO_CHARACTER)
    missing, letter_is_missing = set(), False
    for letter in text:
        if unicodedata.category(letter)[0] != "M":
            letter_is_missing = not letter.isspace() and _pixels(font, letter) == box
        if letter_is_missing:
            missing.add(letter)
    return missing


def _pixels(font: Font, letter: str) -> bytes:
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).text((32, 32), letter, fill=255, font=font)
    return image.tobytes()


def _spelled(letter: str, font: Font) -> str:
    if unicodedata.category(letter) == "Pd":
        return "-"
    parts = unicodedata.normalize("NFKD", letter)
    plain = "".join(part for part in parts if not unicodedata.combining(part))
    if plain and plain != letter and not _missing(font, plain):
        return plain
    return letter.encode("unicode_escape").decode()
