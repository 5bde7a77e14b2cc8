"""Files changed at random, and what reading one may not do: fail otherwise than by an error of
ours, take memory without bound, write anywhere but in its own folder."""

from __future__ import annotations

import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY_BYTES = 3 << 30
"""That a reader may take beyond what the process has."""
_NUMBERS = (
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 400,
    b"9" * 5000,
    b"100000000000000000000",
    b"null",
    b"[]",
    b'""',
)
_TEXTS = (b"[" * 3000, b'{"a":' * 3000, b"../" * 8, b"/dev/zero", b"\0", b"\xff\xfe", b"\x1b[2J")


class Mutations:
    """Endless changed copies of some bytes, the same for a seed."""

    def __init__(self, content: bytes, seed: int) -> None:
        self._content, self._random = content, random.Random(seed)

    def __iter__(self) -> Iterator[bytes]:
        while True:
            changed = bytearray(self._content)
            for _ in range(self._random.choice((1, 1, 1, 2, 4))):
                self._random.choice(_CHANGES)(changed, self._random)
            yield bytes(changed)


def _flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 8))):
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _remove(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data) + 1)
    del data[start : start + chance.randrange(1, 64)]


def _repeat(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data) + 1)
    piece = data[start : start + chance.randrange(1, 256)]
    at = chance.randrange(len(data) + 1)
    data[at:at] = piece * chance.choice((1, 3))


def _overwrite(data: bytearray, chance: random.Random) -> None:
    """With what numbers in binary files look like at their ends."""
    size = chance.choice((1, 2, 4, 8))
    at = chance.randrange(max(1, len(data) - size))
    data[at : at + size] = chance.choice((b"\xff", b"\x7f", b"\x00", b"\x80")) * size


def _insert(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    data[at:at] = chance.choice((*_NUMBERS, *_TEXTS))


def _replace_number(data: bytearray, chance: random.Random) -> None:
    digits = [i for i, byte in enumerate(data[:4000]) if 48 <= byte <= 57]
    if digits:
        at = chance.choice(digits)
        data[at : at + 1] = chance.choice(_NUMBERS)


def _replace_text(data: bytearray, chance: random.Random) -> None:
    quotes = [i for i, byte in enumerate(data[:4000]) if byte == 34]
    if len(quotes) > 1:
        at = chance.randrange(len(quotes) - 1)
        value = chance.choice((*_NUMBERS, b'"../../x"', b'"/etc/passwd"', b'{"a": 1}', b"true"))
        data[quotes[at] : quotes[at + 1] + 1] = value


_CHANGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip, _flip, _cut, _remove, _repeat, _overwrite, _insert, _replace_number, _replace_text,
)  # fmt: skip


class _Watch:
    """Python's own record of files that are opened for writing, removed and renamed."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.elsewhere: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.folder is None or event not in _EVENTS:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return
        paths = [path for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
        for path in map(os.fsdecode, paths[: 2 if event == "os.rename" else 1]):
            if not Path(os.path.abspath(path)).is_relative_to(self.folder):
                self.elsewhere.append(f"{event} {path}")


_EVENTS = {"open", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_watch: list[_Watch] = []


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """What the block writes or removes outside of `folder`. A hook of Python's cannot be taken
    back; it does nothing outside the block."""
    if not _watch:
        _watch.append(_Watch())
    watch = _watch[0]
    watch.folder, watch.elsewhere = folder, []
    try:
        yield watch.elsewhere
    finally:
        watch.folder = None


@contextmanager
def bounded_memory() -> Iterator[None]:
    """MemoryError in the block for more than MEMORY_BYTES."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(
    path: Path,
    read: Callable[[], object],
    errors: tuple[type[Exception], ...],
    folder: Path,
    *,
    seed: int,
    count: int,
    seconds: float,
) -> list[str]:
    """What reading changed copies of the file at `path` did that it may not: one line each.

    Ends after `count` copies or `seconds` of this process. errors: exactly these types may be
    raised, no subclasses. folder: where `read` may write.
    """
    content, faults = path.read_bytes(), []
    started, slowest = time.process_time(), 0.0
    with watched(folder) as elsewhere, bounded_memory():
        for number, changed in zip(range(count), Mutations(content, seed), strict=False):
            begun = time.process_time()
            path.write_bytes(changed)
            try:
                read()
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                if type(error) not in errors:
                    faults.append(f"copy {number}: {type(error).__name__}: {str(error)[:200]}")
            slowest = max(slowest, time.process_time() - begun)
            if time.process_time() - started > seconds:
                break
    path.write_bytes(content)
    if slowest > 20:
        faults.append(f"one copy took {slowest:.0f} s")
    return faults + elsewhere
