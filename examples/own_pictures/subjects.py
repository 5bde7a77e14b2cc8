"""What the names of files and folders say of what images show.

Cameras, phones and programs name their files by a number or by the time, which says nothing. They
are too many for a list, but they do it in few ways (_MACHINE_MADE); a name of such a kind that
somebody chose is refused, too, which is heard at once, while a wrong subject is trained for days.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

CAMERA_NAMES = frozenset(
    "cimg dcim dji dsc dscf dscn gopr image img mvi mvimg pano photo pict picture pxl screenshot "
    "untitled unnamed vid whatsapp".split()
)
"""What says nothing alone, or before a number (`Screenshot_2024`)."""
JOINERS = "\u200c\u200d"
"""Join or part letters of Persian and Indian scripts, inside of words."""

_DAY = r"(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01])"
_MACHINE_MADE = (
    # Four capitals, digits or _ and a number of four digits, as cameras' standard (DCF) has it:
    # P1010001, GOPR0001, DSC_0001; with whatever an editor adds.
    re.compile(r"^[A-Z0-9_]{4}\d{4}(?![^\W_])"),
    re.compile(r"^[A-Za-z]\d{6,}"),
    # A day with the time: 20240101_1234, 2024-01-01 at 12.00.00.
    re.compile(rf"(?<!\d){_DAY}\D{{0,9}}\d\d[-_.:h]?\d\d"),
    # Numbers of messages and of moments; random names.
    re.compile(r"\d{9}"),
    re.compile(r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}"),
    re.compile(r"(?<![^\W_])(?=[A-Fa-f]*\d)[0-9A-Fa-f]{16,}(?![^\W_])"),
)
_CAMERA_FOLDER = re.compile(r"[1-9]\d\d[A-Z0-9_]{5}")
"""By the same standard: 100CANON, 101MSDCF."""


def subject_of(path: Path) -> str:
    """The subject that an image's folder names, else its own name; "" where neither does."""
    folder = path.parent.name
    named = "" if _CAMERA_FOLDER.fullmatch(folder) else _subject(folder)
    return named or _subject(path.stem)


def _subject(name: str) -> str:
    """The words of a name in composed letters (NFC): macOS writes an accent as a character of its
    own, which would be another word to a tokenizer."""
    name = unicodedata.normalize("NFC", name)
    if any(made.search(name) for made in _MACHINE_MADE):
        return ""
    words = _words(name)
    before_number = _words(re.split(r"(?<=[^\W\d_])[\W_]*\d", name, maxsplit=1)[0])
    if all(word.casefold() in CAMERA_NAMES for word in words):
        return ""
    if before_number != words and all(w.casefold() in CAMERA_NAMES for w in before_number):
        return ""
    return " ".join(words)


def _words(name: str) -> list[str]:
    """Runs of letters with their marks: vowels of Indian and Thai words are marks."""
    kept = ""
    for letter in name:
        is_letter = letter.isalnum() and not letter.isdecimal()
        belongs = unicodedata.category(letter)[0] == "M" or letter in JOINERS
        kept += letter if is_letter or (belongs and kept[-1:].strip()) else " "
    return [word.strip(JOINERS) for word in kept.split()]
