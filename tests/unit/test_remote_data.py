"""Which URLs of a dataset's files may be read: those below KOSMOSG_REMOTE_DATA, plain ones, of a
protocol that fsspec has here."""

from __future__ import annotations

import shlex
import sys

import pytest

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.remote_data import VARIABLE, check_allowed
from megatron_kosmosg.data import remote_file
from megatron_kosmosg.data.remote_file import RemoteFile


@pytest.mark.parametrize(
    ("value", "url", "is_allowed"),
    [
        ("s3://b/laion", "s3://b/laion/0.bin", True),
        ("s3://b/laion/,gs://c", "gs://c/x/0.bin", True),
        ("gs://c s3://b/laion", "s3://b/laion/x/0.bin", True),
        ("s3://b", "s3://b/0.bin", True),
        ("s3://b/laion", "s3://b/laion2/0.bin", False),
        ("s3://b/laion", "s3://b/laion", False),
        ("s3://b/laion", "s3://b/laion/../0.bin", False),
        ("s3://b/laion", "s3://b/laion//0.bin", False),
        ("s3://b/laion", "gs://b/laion/0.bin", False),
        ("s3://b/laion", "s3://me@b/laion/0.bin", False),
        ("http://h/x", "http://h/x/%2e%2e/0.bin", False),
        ("http://h/x", "http://h/x/0.bin?token=1", False),
        ("s3://b", "simplecache::s3://b/0.bin", False),
        ("file:///data", "/data/0.bin", False),
        ("file:///data", "file:///data/0.bin", True),
        ("s3://b", "s3://b/x,y/0.bin", False),
        ("s3://b", "s3://b/x\u202e/0.bin", False),
        ("s3://", "s3://b/0.bin", False),
        ("/data", "file:///data/0.bin", False),
        ("", "s3://b/0.bin", False),
    ],
)
def test_only_urls_below_a_folder_that_is_allowed_are_read(value, url, is_allowed):
    if is_allowed:
        check_allowed(url, {VARIABLE: value})
        return
    with pytest.raises(ConfigError) as raised:
        check_allowed(url, {VARIABLE: value})
    named = value if value in ("s3://", "/data") else url  # what is wrong
    assert named in str(raised.value) or repr(named) in str(raised.value)


def test_what_an_error_advises_is_one_word_for_a_shell():
    url = "s3://b/x;touch$IFS''here;/0.bin"
    with pytest.raises(ConfigError) as raised:
        check_allowed(url, {})
    advice = str(raised.value).rpartition("allow its folder: ")[2]
    words = shlex.split(advice, comments=True)
    assert words == ["export", f"{VARIABLE}={url.rpartition('/')[0]}"]


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setenv(VARIABLE, "s3://b nothing://b ftp://h")
    remote_file._file_system_of.cache_clear()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3fs.*pip install 'megatron-kosmosg\[remote\]'"):
        RemoteFile("s3://b/0.bin")
    with pytest.raises(ConfigError, match="nothing:// is no protocol of fsspec"):
        RemoteFile("nothing://b/0.bin")
    with pytest.raises(ConfigError, match="ftp:// needs more than a URL says"):
        RemoteFile("ftp://h/0.bin")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    remote_file._file_system_of.cache_clear()
    with pytest.raises(ConfigError, match=r"needs fsspec: pip install 'megatron-kosmosg\[remote"):
        RemoteFile("s3://b/0.bin")
