"""Files and folders that appear whole or not at all, locks between processes, and short names for
contents.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from megatron_kosmosg.foreign_files import files_below

logger = logging.getLogger(__name__)
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""Errors of a disk that is full, over its quota or read-only, and of a file that may not grow."""
_OF_RUST = re.compile(r"\(os error (\d+)\)")


@contextmanager
def replacing(path: Path, *, only_writer: bool = False) -> Iterator[Path]:
    """A new empty file beside `path` to fill; at the end it takes `path`'s place in one step.

    It follows no link, and is removed when the block fails: `path` is then what it was. Its name is
    random, so that two processes may write the same file. only_writer: no other process does; the
    name is then fixed, and what a killed process left is replaced. Raises OSError where the folder
    cannot be written to.
    """
    temporary = temporary_name(path, only_writer=only_writer)
    if only_writer:
        temporary.unlink(missing_ok=True)
    with naming_disk(path):
        open_itself(temporary, "xb").close()
    try:
        with naming_disk(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:  # an interrupt too
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path, *, only_writer: bool = False, replaces: bool = False) -> Iterator[Path]:
    """A new empty folder beside `path` to fill; at the end it gets the name `path` in one step.

    It is removed when the block fails. only_writer: as in `replacing`. replaces: what has the name
    until then goes, a link itself and not what it leads to; else FileExistsError is raised at the
    end, and what is there stays. Raises OSError where the folder cannot be written to.
    """
    with naming_disk(path):
        temporary = begin_folder(path, only_writer=only_writer)
    try:
        with naming_disk(path):
            yield temporary
        finish_folder(temporary, path, only_writer=only_writer, replaces=replaces)
    except BaseException:  # an interrupt too
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def naming_disk(path: Path) -> Iterator[None]:
    """What is written inside becomes `path`, or lies there: where the disk refuses it, the OSError
    that is raised says so. A call that writes knows no name, safetensors, written in Rust, raises
    no OSError at all, and torch.save hides it behind a RuntimeError."""
    try:
        yield
    except OSError as error:
        if error.errno in OF_THE_DISK and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        found = _OF_RUST.search(str(error))
        code = int(found[1]) if found else None
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            code = error.__context__.errno
        if code not in OF_THE_DISK:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def begin_folder(path: Path, *, only_writer: bool = False) -> Path:
    """The new empty folder of `new_folder`, where not one block holds all of the work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path, only_writer=only_writer)
    if only_writer:
        remove(temporary)
    temporary.mkdir()
    return temporary


def finish_folder(
    temporary: Path, path: Path, *, only_writer: bool = False, replaces: bool = False
) -> None:
    """Gives the filled folder of `new_folder` its name."""
    if replaces:
        remove_folder(path, only_writer=only_writer)
    try:
        temporary.rename(path)
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "is already there", str(path)) from None
        raise


def remove_folder(path: Path, *, only_writer: bool = False) -> None:
    """Deletes it, a link itself; under another name first: half of it never has this one."""
    doomed = temporary_name(path.with_name(f"{path.name}.old"), only_writer=only_writer)
    if os.path.lexists(path):
        if only_writer:
            remove(doomed)
        path.rename(doomed)
        remove(doomed)


def temporary_name(path: Path, *, only_writer: bool = False) -> Path:
    """Beside `path`: a random one, or of a path that one process writes always the same."""
    middle = "" if only_writer else f".{secrets.token_hex(4)}"
    return path.with_name(f"{path.name}{middle}.tmp")


def remove(path: Path) -> None:
    """Whatever has the name, if anything: of a link itself, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def real_folder(path: Path) -> Path:
    """The folder `path`, made if need be, for files that are going to be replaced and deleted.

    Raises OSError where it is a link: they would be replaced and deleted in a folder of another
    name, which whoever made the link has chosen.
    """
    refuse_link(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def refuse_link(path: Path) -> None:
    """Raises OSError where `path` is a link, whatever that leads to."""
    if path.is_symlink():
        what = "is a link, which is not followed here; remove it"
        raise OSError(errno.ELOOP, what, str(path))


def open_itself(path: Path, mode: str, encoding: str | None = None) -> IO[Any]:
    """Opens a file as `path.open(mode)` does, but raises OSError where it is a link, whatever that
    leads to."""
    try:
        return open(path, mode, encoding=encoding, opener=_without_following)
    except OSError:
        refuse_link(path)
        raise


def _without_following(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_text(path: Path, text: str, *, only_writer: bool = False) -> None:
    """Writes the text as UTF-8; the file appears whole or not at all."""
    with replacing(path, only_writer=only_writer) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(
    path: Path, value: Any, indent: int | None = 1, *, only_writer: bool = False
) -> None:
    """The file with a newline at the end, whole or not at all."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    write_text(path, text, only_writer=only_writer)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Waits until no other process is inside the same `path`, which is created and stays.

    On file systems without locks it lets everyone in, with a warning: work is then done twice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    open_itself(path, "a").close()  # a link would be followed, and its target emptied
    lock = FileLock(path)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s); going on without a lock", path, error)
    try:
        yield
    finally:
        lock.release()


SAMPLES, SAMPLE_BYTES = 64, 4096
"""Of a file's fingerprint, spread evenly from the first byte to the last."""


def fingerprint(*paths: Path) -> str:
    """A name of 16 hexadecimal digits for the contents of files and folders (without hidden files).

    Of every file the name, the size and samples of its bytes count, which takes a moment even for
    large models; training changes all weights, so that samples notice it. The location does not
    count. Raises ValueError for what is no file, and for more files than a model can have.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        for file in [path] if path.is_file() else sorted(files_below(path)):
            if not file.is_file():
                raise ValueError(f"{file} is no regular file")
            size = file.stat().st_size
            # A file given by itself may be renamed.
            name = "" if file == path else file.relative_to(path).as_posix()
            digest.update(f"{name}|{size}|".encode())
            _add_samples(file, size, digest)
        digest.update(b"|next|")
    return digest.hexdigest()


def _add_samples(path: Path, size: int, digest: hashlib.blake2b) -> None:
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
            return
        for i in range(SAMPLES):
            file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
