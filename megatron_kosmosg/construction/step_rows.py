"""Rows: what a step made of each image of a shard, as JSON lines; and the settings of a step.

A row is {"key", ...} or, for an image that is left out, {"key", "rejected", "detail"}. The file of
a shard appears when the shard is done, so it is also the mark of that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_kosmosg.data.kinds.record import Rejected
from megatron_kosmosg.files import exclusive, replacing
from megatron_kosmosg.shards import ShardFolder

Row = dict[str, Any]
_CALLED_TODAY = {
    "--precision": "--dtype",
    "--picture-size": "--image-size",
    "--picture-format": "--image-format",
}
"""Options by the names that settings files know them under, which stay so that an old one fits."""


def rejected_row(key: str, rejected: Rejected) -> Row:
    """The row of an image that is left out."""
    return {"key": key, "rejected": rejected.reason, "detail": rejected.detail}


class StepFolder:
    """The finished shards of one step: NUMBER.jsonl, which is also the mark."""

    def __init__(self, output: Path, name: str) -> None:
        self.path = output / name
        self.shards = ShardFolder(
            self.path,
            mark="{:06d}.jsonl",
            settings_file="settings.json",
            advice="go on with those, or delete that folder and those of the steps after it",
        )

    def begin(self, settings: dict[str, Any]) -> None:
        """Notes what the rows are made with. Raises ValueError where they were begun otherwise."""
        with exclusive(self.path / "lock"):
            self.shards.begin(settings, _CALLED_TODAY)

    def shard(self, number: int) -> Path:
        """The file of a shard, whether or not it is there yet."""
        return self.shards.mark_of(number)

    def read(self, number: int) -> list[Row]:
        """The rows that the step wrote for a finished shard."""
        with self.shard(number).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def write(self, number: int, rows: Iterable[Row]) -> int:
        """Finishes a shard; the number of its rows."""
        count = 0
        with (
            replacing(self.shard(number), only_writer=True) as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        return count
