"""What a terminal may be shown of texts that come from files: names, keys, captions, errors.

A control character in one could colour, move or retitle the terminal, answer for the user, or make
a line read otherwise than it is.
"""

from __future__ import annotations

import re
import sys
import time

_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
"""C0 and C1, ends of lines and of paragraphs, changes of direction, and halves of characters."""
_IN_A_LINE = re.compile(f"[{_CONTROLS}]")
_IN_LINES = re.compile(f"(?![\\n\\t])[{_CONTROLS}]")


def printable(text: object) -> str:
    r"""The text in one line, with control characters as Python spells them, such as `\x1b`."""
    return _IN_A_LINE.sub(_spelt, str(text))


def printable_lines(text: object) -> str:
    """A text of several lines as a terminal may show it: like `printable`, but ends of lines and
    tabs stay."""
    return _IN_LINES.sub(_spelt, str(text))


def say(what: str) -> None:
    """Prints a line of the log on stderr, with the time."""
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{when} {printable_lines(what)}", file=sys.stderr, flush=True)


def _spelt(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]
