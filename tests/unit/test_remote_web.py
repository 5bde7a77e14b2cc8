"""A web server as object storage, through fsspec and aiohttp: failures that pass, and servers that
send whole files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.config.remote_data import VARIABLE
from megatron_kosmosg.data import remote_file
from megatron_kosmosg.data.remote_file import RemoteFile, StorageError
from tests.support.bucket import Ranges

if not os.environ.get("KOSMOSG_REQUIRE_AIOHTTP"):
    pytest.importorskip("aiohttp")

CONTENT = bytes(range(256)) * 4096


@pytest.fixture
def serve(tmp_path, monkeypatch) -> Iterator:
    """The URL of FILE.bin behind a server with such a handler."""
    (tmp_path / "FILE.bin").write_bytes(CONTENT)
    monkeypatch.setattr(Ranges, "folder", tmp_path, raising=False)
    monkeypatch.setattr(remote_file, "WAITS", (0.0, 0.0))
    remote_file._file_system_of.cache_clear()
    servers = []

    def started(handler) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv(VARIABLE, address)
        return f"{address}/FILE.bin"

    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


class Failing(Ranges):
    """Answers a number of requests with a status of failure."""

    left: list[int] = []

    def do_HEAD(self):
        self.answered(super().do_HEAD)

    def do_GET(self):
        self.answered(super().do_GET)

    def answered(self, answer) -> None:
        if self.left:
            self.send_error(self.left.pop())
        else:
            answer()


@pytest.mark.parametrize("status", [500, 503, 429, 403])
def test_a_failure_that_passes_is_asked_again(serve, monkeypatch, status):
    """fsspec says of each that there is no such file."""
    monkeypatch.setattr(Failing, "left", [status] * 2)  # its HEAD and the GET that it tries then
    url = serve(Failing)
    assert RemoteFile(url).read(1000, 7) == CONTENT[1000:1007]
    monkeypatch.setattr(Failing, "left", [status] * 99)
    with pytest.raises(StorageError, match="in 3 attempts"):
        RemoteFile(url)


def test_a_server_that_is_gone_is_no_missing_file(serve, monkeypatch):
    url = serve(Ranges)
    gone = url.replace("127.0.0.1", "127.0.0.2")
    monkeypatch.setenv(VARIABLE, gone.rpartition("/")[0])
    with pytest.raises(StorageError, match="in 3 attempts"):
        RemoteFile(gone)


@pytest.mark.parametrize("status", [404, 410])
def test_a_file_that_is_not_there_is_said_at_once(serve, monkeypatch, status):
    monkeypatch.setattr(Failing, "left", [status] * 99)
    url = serve(Failing)
    with pytest.raises(InputError, match="nothing is there"):
        RemoteFile(url)
    assert len(Failing.left) >= 97


class Whole(SimpleHTTPRequestHandler):
    """Python's own, which knows no ranges and does not say so."""

    def log_message(self, *_):
        """Says nothing."""


def test_a_server_of_whole_files_is_refused_before_it_is_used(serve, tmp_path):
    RemoteFile(serve(Ranges)).check_ranges()
    remote = RemoteFile(serve(partial(Whole, directory=str(tmp_path))))
    assert remote.size == len(CONTENT)
    with pytest.raises(InputError, match="whole files only"):
        remote.check_ranges()
