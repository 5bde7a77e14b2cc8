"""A file in object storage, read by position through fsspec: a request for each stretch.

Needs fsspec, and the package of the URL's protocol, when the first such file is read and not
before. Accounts and endpoints are fsspec's own configuration.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from megatron_kosmosg.config.errors import ConfigError, InputError
from megatron_kosmosg.config.remote_data import check_allowed

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before the second request, the third, ...; then it is given up."""
READS_TOGETHER = 16
"""Requests that are worth having under way at once, where many are known beforehand."""


class StorageError(OSError):
    """Object storage did not give what it was asked for, also when asked again. Says nothing of
    the sample that was to be read: it is no bad image."""


class RemoteFile:
    """Bytes at a URL, by position; safe to use from several threads and after a fork."""

    reads_together = READS_TOGETHER

    def __init__(self, url: str, size: int | None = None) -> None:
        """Takes note of the URL. Raises ConfigError for one that may not be read, and where `size`
        is None what `stored_size` raises.

        Args:
            size: which it should have; it is asked for before the first bytes are. None: now.
        """
        check_allowed(url)
        self.url = url
        self.size = self.stored_size() if size is None else size
        self._is_checked = size is None

    def check(self) -> None:
        """Raises InputError where the file has another size than it should have, and what
        `stored_size` raises. It asks once; threads that come together may each ask."""
        if self._is_checked:
            return
        stored = self.stored_size()
        if stored != self.size:
            raise InputError(f"{self.url} has {stored} bytes, its index needs {self.size}")
        self._is_checked = True

    def stored_size(self) -> int:
        """The size in bytes, by one request, which reads nothing of the content.

        Raises ConfigError where a package is missing, InputError where nothing is there or only
        the whole could be read, StorageError where it cannot be asked for.
        """
        url = self.url
        try:
            found = _again(f"the size of {url}", lambda: _file_system(url).info(url))
        except FileNotFoundError:
            raise InputError(f"{url}: nothing is there") from None
        if found.get("partial") is False:
            raise InputError(f"{url}: the server gives whole files only, no ranges of bytes")
        size = found.get("size")
        if not isinstance(size, int):
            raise InputError(f"{url}: the server does not say how large it is")
        return size

    def check_ranges(self) -> None:
        """Raises InputError for a web server that would send the whole file for each of its
        stretches: not all say so when they are asked for the size."""
        if self.url.startswith(("http://", "https://")) and self.size > 1:
            _again(f"one byte of {self.url}", self._ask_for_a_byte)

    def _ask_for_a_byte(self) -> None:
        # Not cat_file, which waits for whatever comes: this notices after the first piece.
        with _file_system(self.url).open(self.url, cache_type="none") as opened:
            opened.seek(1)
            try:
                opened.read(1)
            except ValueError as error:
                raise InputError(
                    f"{self.url}: the server gives whole files only, no ranges of bytes ({error})"
                ) from None

    def array(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop), which lie in the file, in one request: uint8, read-only. Raises
        StorageError, and what `check` raises."""
        self.check()
        if start == stop:
            return np.zeros(0, np.uint8)
        what = f"bytes {start} to {stop} of {self.url}"
        try:
            return np.frombuffer(_again(what, lambda: self._request(start, stop)), np.uint8)
        except FileNotFoundError:
            raise StorageError(f"{what}: it is not there any more") from None

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, fewer at the end. Raises StorageError."""
        return self.array(start, max(start, min(start + length, self.size))).tobytes()

    def close(self) -> None:
        """Does nothing: connections belong to the process."""

    def _request(self, start: int, stop: int) -> bytes:
        found = _file_system(self.url).cat_file(self.url, start=start, end=stop)
        if not isinstance(found, bytes) or len(found) != stop - start:
            raise OSError(f"{len(found)} bytes came instead of {stop - start}")
        return found


def _file_system(url: str) -> AbstractFileSystem:
    """The process's file system of a URL's protocol. Raises ConfigError where a package is
    missing."""
    return _file_system_of(url.partition("://")[0], os.getpid())


@cache
def _file_system_of(protocol: str, process: int) -> AbstractFileSystem:
    """Loops and connections of another `process` do not outlive a fork."""
    try:
        import fsspec
    except ImportError:
        raise ConfigError(
            f"{protocol}:// data needs fsspec: pip install 'megatron-kosmosg[remote]'"
        ) from None
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        raise ConfigError(
            f"{protocol}:// data needs another package ({error}); for S3: pip install "
            "'megatron-kosmosg[remote]'"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{protocol}:// is no protocol of fsspec: {error}") from None
    except TypeError as error:
        raise ConfigError(
            f"{protocol}:// needs more than a URL says ({error}); fsspec's configuration files may "
            "have it"
        ) from None


def _again(what: str, request: Callable[[], Result]) -> Result:
    """What `request` gives, asked again after a failure that may pass. Raises StorageError after
    the last one; what is not there or not allowed is not asked for again."""
    for attempt, wait in enumerate((*WAITS, None), 1):
        try:
            return request()
        except (ConfigError, InputError):
            raise
        except FileNotFoundError as error:
            if not _hides_another(error):
                raise
            problem: BaseException = error.__cause__ or error
        except PermissionError as error:
            raise StorageError(
                f"{what}: access is denied ({_words(error)}); accounts are set up as fsspec's "
                "package for the protocol takes them"
            ) from error
        except Exception as error:  # noqa: BLE001 - each protocol's package has errors of its own
            problem = error
        if wait is None:
            raise StorageError(
                f"{what} did not come in {attempt} attempts, the last: {_words(problem)}"
            ) from problem
        logger.warning("%s: %s; asked again in %g s", what, _words(problem), wait)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _hides_another(error: FileNotFoundError) -> bool:
    """Whether a web server's failure is behind it: fsspec's HTTP says of every size that it could
    not ask for that nothing is there."""
    cause = error.__cause__
    module = type(cause).__module__.partition(".")[0]
    is_of_web = isinstance(cause, (TimeoutError, ConnectionError)) or module == "aiohttp"
    return is_of_web and getattr(cause, "status", None) not in (404, 410)


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
