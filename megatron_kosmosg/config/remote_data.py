"""A dataset's .bin file in object storage: its URL stands in PREFIX.bin.url, and a run reads only
below what KOSMOSG_REMOTE_DATA allows.

Nothing is read over a network here, and fsspec is not imported; data/remote_file.py does both.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from megatron_kosmosg.config.errors import ConfigError, InputError
from megatron_kosmosg.files import write_json
from megatron_kosmosg.foreign_files import read_json

VARIABLE = "KOSMOSG_REMOTE_DATA"
"""Folders that may be read, as URLs with spaces or commas between them."""
ENDING = ".url"
"""Behind the name of the file that lies elsewhere."""
_LONGEST = 2048
_SMALL = 16 << 10
"""Bytes of a .url file, far more than it has."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_MEANS_MORE = re.compile(r"[\s,\x00-\x1f\x7f%?#\\*\[\]{}]|::")
"""What parts folders here, escapes, queries, patterns and fsspec's chains of file systems."""


def url_path(file: str | Path) -> Path:
    """Where the URL of a file that lies elsewhere is noted."""
    return Path(f"{file}{ENDING}")


def write_url(file: str | Path, url: str) -> None:
    """Notes that the content of `file` is at `url`."""
    write_json(url_path(file), {"url": url})


def allowed_url(file: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """The URL that is noted for `file`.

    Args:
        environment: what has KOSMOSG_REMOTE_DATA; None: os.environ.

    Raises FileNotFoundError where none is noted, InputError for a note that cannot be read, and
    ConfigError for a URL that may not be read.
    """
    path = url_path(file)
    try:
        fields = read_json(path, _SMALL)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no note of a URL: {error}") from None
    url = fields.get("url") if isinstance(fields, dict) and len(fields) == 1 else None
    if not isinstance(url, str):
        raise InputError(f'{path} is no note of a URL: it is not {{"url": "..."}}')
    try:
        check_allowed(url, environment)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return url


def check_allowed(url: str, environment: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError unless `url` is a plain one that lies in a folder of
    KOSMOSG_REMOTE_DATA."""
    parts = _parts(url)
    value = (os.environ if environment is None else environment).get(VARIABLE, "")
    for folder in filter(None, re.split(r"[\s,]+", value)):
        try:
            allowed = _parts(folder.rstrip("/"))
        except ConfigError as error:
            raise ConfigError(f"{VARIABLE}={value!r}: {error}") from None
        if len(parts) > len(allowed) and parts[: len(allowed)] == allowed:
            return
    says = f"{VARIABLE}={value!r} does not allow" if value else f"{VARIABLE} is not set to allow"
    raise ConfigError(
        f"{says} reading {url}; where it is yours, allow its folder: "
        f"export {VARIABLE}={shlex.quote(url.rpartition('/')[0])}"
    )


def _parts(url: str) -> list[str]:
    """Scheme, host or bucket, and the components of the path. Raises ConfigError for what is not
    plain: names that a library would read as something else."""
    found = _SCHEME.fullmatch(url)
    shown = repr(url[:200])
    if found is None or len(url) > _LONGEST:
        raise ConfigError(f"{shown} is no URL such as s3://bucket/folder")
    scheme, rest = found.groups()
    host, *path = rest.split("/")
    if _MEANS_MORE.search(rest) or not rest.isprintable() or "@" in host:
        raise ConfigError(
            f"{shown} has more than plain names: no spaces, none of ,%?#\\*[]{{}}, no '::', no "
            "account before the host"
        )
    if any(name in ("", ".", "..") for name in path) or host in (".", ".."):
        raise ConfigError(f"{shown} has an empty component, '.' or '..'")
    if not host and not path:
        raise ConfigError(f"{shown} names no host, bucket or folder")
    return [scheme, host, *path]
