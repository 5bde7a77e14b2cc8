"""The folder beside the output that holds finished shards until the dataset is whole.

It outlives a killed run; --resume takes it up again if it belongs to the very same job. Other than
where ranks share a folder, one run at a time works in it: its leader deals the shards out.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO, Any

from megatron_kosmosg.files import open_itself, real_folder, refuse_link
from megatron_kosmosg.shards import ShardFolder

LOCK_FILE = "lock"
_ENDING = ".partial"


def is_work_folder(folder: Path) -> bool:
    """Whether an unfinished run keeps its shards there."""
    is_named_so = folder.name.startswith(".") and folder.name.endswith(_ENDING)
    return is_named_so and (folder / LOCK_FILE).exists()


class WorkFolder:
    """The folder `.NAME.partial` beside the output prefix .../NAME, locked by the run that works in
    it."""

    def __init__(self, prefix: Path) -> None:
        self.path = prefix.parent / f".{prefix.name}{_ENDING}"
        self.shards = ShardFolder(
            self.path,
            mark="{:08d}.counts.json",
            advice="run as before, or without --resume to start anew",
        )
        self._lock: IO[str] | None = None

    def open(self, job: dict[str, Any], resume: bool) -> None:
        """Makes the folder ready for `job`, which says everything the output depends on.

        Raises ValueError when another run is at work in it, or when --resume finds another job's;
        OSError when it is a link, or one is to be resumed from.
        """
        real_folder(self.path)
        self._take_lock()
        if resume and self.shards.is_begun:
            for path in self.path.iterdir():
                refuse_link(path)
        else:
            self.shards.clear(keep=[LOCK_FILE])
        self.shards.begin(job)

    def remove(self) -> None:
        """Deletes the folder; killed at any moment, what is left is not taken up again."""
        self.shards.remove()
        self.close()

    def close(self) -> None:
        """Gives up the lock on the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        # For the whole run, and through the forks of its workers: files.exclusive is for moments.
        self._lock = open_itself(self.path / LOCK_FILE, "a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ValueError(
                f"another run is writing this dataset: it holds {self.path}"
            ) from error
        except OSError:
            # A file system without locks: the user must not start two runs at once.
            return
