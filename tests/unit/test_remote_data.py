"""Which URLs of a dataset's files may be read: those below KOSMOSG_REMOTE_DATA, and plain ones."""

from __future__ import annotations

import pytest

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.remote_data import VARIABLE, check_allowed


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
    assert named in str(raised.value)
