"""A run folder has one owner: two runs that write the same folder destroy each other's checkpoints.

Rank 0 keeps `owner.json` in the folder while it trains: who it is, and by the file's time that it
is alive. The times are those of the file server on both sides, so that clocks need not agree.
Whoever finds a sign of life is refused; a file without one, or of a process that is known to be
gone, is taken over. An owner that was taken for dead (frozen, or cut off from the disk) finds
another's name in the file, and writes nothing more.
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.files import open_itself, temporary_name
from megatron_kosmosg.foreign_files import read_json
from megatron_kosmosg.launcher import find_job, node_name

OWNER_FILE = "owner.json"
BEAT_SECONDS, STALE_SECONDS = 10.0, 60.0
"""Between signs of life, and without one until another run may have the folder: a disk that does
not answer for half a minute is no death."""
SINCE_FORMAT = "%Y-%m-%d %H:%M:%S %z"
"""Of the time since when an owner has the folder."""


class RunFolderTaken(InputError):
    """The folder belongs to another run; nothing of this one may be written into it."""


@dataclass(frozen=True)
class Holder:
    """Who has a run folder, as the file says it."""

    token: str
    """Of this claim alone."""
    node: str
    machine: str
    """Tells whether a process number means the same process to two readers: the boot and the
    namespace. Empty where that is not known."""
    pid: int
    pid_started: str
    """By the kernel's count; with `pid` the same process, not a later one of its number."""
    job: str
    """Slurm's number of the job, empty without one."""
    restart: int
    """How often Slurm had started the job before."""
    user: str
    since: str

    def __str__(self) -> str:
        job = f"Slurm job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} of {self.user} on {self.node}, since {self.since}"


class RunOwner:
    """The claim of one process on a folder: a context manager, entered before anything is written.

    Entering it waits up to STALE_SECONDS for a sign of life of a former owner that may be dead.
    Raises RunFolderTaken for one that is not, OSError where the folder cannot be written to.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        """Entering the context takes the folder.

        Args:
            folder: the run's folder.
            log: is told when the folder is taken over, and that this waits.
        """
        self._path, self._log = folder / OWNER_FILE, log
        job, restart = find_job()
        self._holder = Holder(
            token=secrets.token_hex(16),
            node=node_name(),
            machine=_machine(),
            pid=os.getpid(),
            pid_started=_started(os.getpid()),
            job=job,
            restart=restart,
            user=_user(),
            since=time.strftime(SINCE_FORMAT),
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="run owner", daemon=True)

    def __enter__(self) -> RunOwner:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            self._take_over()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=1.0)  # one may be waiting for a disk
        with suppress(OSError):
            if self._is_owner():
                self._path.unlink()

    def check(self) -> None:
        """Raises RunFolderTaken once the folder is no longer this process's."""
        if not self._is_owner():
            found = _read(self._path)
            now = "nobody" if found is None else str(found)
            raise RunFolderTaken(
                f"{self._path.parent} was taken over while this run gave no sign of life; it "
                f"belongs to {now}. Nothing more is written there"
            )

    def _create(self) -> bool:
        """Whether this call made the file; False where there is one already."""
        try:
            with open_itself(self._path, "x", encoding="utf-8") as file:
                json.dump(asdict(self._holder), file)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> None:
        """Moves the file of an owner that is gone out of the way."""
        found = _read(self._path)
        if found is None or not self._is_known_to_be_gone(found):
            self._await_death(found)
        old = temporary_name(self._path.with_name("owner.old.json"))
        with suppress(FileNotFoundError):
            os.rename(self._path, old)
            moved = _read(old)
            if moved != found:  # another was quicker, and this is its file
                with suppress(OSError):
                    os.link(old, self._path)
                old.unlink()
                raise self._taken(moved, 0)
            old.unlink()
            self._log(f"{self._path.parent}: its former owner is gone ({found or 'unknown'})")

    def _await_death(self, found: Holder | None) -> None:
        """Returns when the file has had no sign of life for STALE_SECONDS."""
        first, has_announced = None, False
        while True:
            try:
                touched = os.stat(self._path).st_mtime_ns
            except FileNotFoundError:
                return
            age = (self._file_server_time() - touched) / 1e9
            first = touched if first is None else first
            if touched != first or _read(self._path) != found:
                raise self._taken(_read(self._path), age)
            if age > STALE_SECONDS:
                return
            if not has_announced:
                self._log(
                    f"{self._path.parent} belongs to {found or 'another process'}, last sign of "
                    f"life {max(age, 0):.0f} s ago: waiting for the next, or {STALE_SECONDS:.0f} s "
                    "without one"
                )
                has_announced = True
            time.sleep(min(1.0, BEAT_SECONDS / 4))

    def _taken(self, holder: Holder | None, age: float) -> RunFolderTaken:
        return RunFolderTaken(
            f"logging.output_dir={self._path.parent} belongs to a run that is alive: "
            f"{holder or 'another process'} (last sign of life {max(age, 0):.0f} s ago). End that "
            "run first, or give this one another logging.output_dir"
        )

    def _is_known_to_be_gone(self, found: Holder) -> bool:
        holder = self._holder
        if found.job and found.job == holder.job and found.restart < holder.restart:
            return True  # Slurm starts a job again only when its former start has ended
        if not holder.machine or found.machine != holder.machine:
            return False
        return _started(found.pid) != found.pid_started

    def _file_server_time(self) -> int:
        """Nanoseconds, by the clock that also dates the owner's file."""
        probe = temporary_name(self._path)
        with open_itself(probe, "x"):
            pass
        try:
            return os.stat(probe).st_mtime_ns
        finally:
            probe.unlink()

    def _is_owner(self) -> bool:
        found = _read(self._path)
        return found is not None and found.token == self._holder.token

    def _keep_alive(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # the run itself will say what is wrong with the disk
                if self._is_owner():
                    os.utime(self._path)


def _read(path: Path) -> Holder | None:
    """The holder that a file names. None where there is no file, or one that says nothing: its
    maker may be writing it."""
    try:
        return Holder(**read_json(path))
    except (OSError, ValueError, TypeError):
        return None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """The time when the process began; "" where there is none, or where it is dead and not yet
    collected."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())
