"""Ranks without which a run went on: the end of each, in a file of the run's folder.

Without torch, for a task whose rank was killed writes it, too.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from megatron_kosmosg.config.paths import LOST_RANKS_FILE
from megatron_kosmosg.foreign_files import read_json
from megatron_kosmosg.launcher import node_name
from megatron_kosmosg.monitoring.run_owner import OWNER_FILE, SINCE_FORMAT
from megatron_kosmosg.terminal_text import printable_lines

_TIME = "%Y-%m-%d %H:%M:%S"
_ENTRY = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (score rank \d+) on (\S+) (.+)$")


def note_lost_rank(folder: Path, name: str, what: str, traceback: str = "") -> None:
    """Says on stderr, and at the end of `lost_ranks.txt`, what became of a rank.

    Args:
        folder: the run's folder.
        name: of the rank.
        what: became of it, such as "was ended by SIGKILL".
        traceback: of the error that ended it.
    """
    head = f"{time.strftime(_TIME)} {name} on {node_name()} {what}, which does not end the run"
    text = printable_lines(f"{head}:\n{traceback.rstrip()}" if traceback else head)
    print(text, file=sys.stderr, flush=True)
    with suppress(OSError), open(folder / LOST_RANKS_FILE, "a", encoding="utf-8") as file:
        file.write(f"{text}\n\n")  # at once: other ranks write there, too


def lost_ranks(folder: Path, since: float) -> list[str]:
    """Who was lost after `since` (seconds since 1970), and how: "score rank 2 on n01 was ended by
    SIGKILL". The traceback is left to the file."""
    try:
        lines = (folder / LOST_RANKS_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for entry in filter(None, map(_ENTRY.match, lines.splitlines())):
        when, name, node, what = entry.groups()
        with suppress(ValueError):
            if time.mktime(time.strptime(when, _TIME)) + 1 > since:
                found.append(f"{name} on {node} {what.partition(',')[0]}")
    return found


def latest_start(folder: Path) -> float:
    """When the latest start of the run in `folder` began, in seconds since 1970: by its claim, and
    when that is gone by the config that it wrote."""
    try:
        since = str(read_json(folder / OWNER_FILE).get("since"))
        return datetime.strptime(since, SINCE_FORMAT).timestamp()
    except (OSError, ValueError, AttributeError):
        return (folder / "config.yaml").stat().st_mtime


def lost_in_words(lost: Sequence[str], folder: str, *, is_running: bool) -> str | None:
    """Who was lost, and what to do about it; None where nobody was."""
    if not lost:
        return None
    what = f"{'; '.join(lost)} ({LOST_RANKS_FILE} says more). "
    if not is_running:
        return what + "The next start begins with all of them"
    return what + (
        f"The run goes on without; kosmosg score-rank --run {folder}, from any job, can take the "
        "place of one"
    )
