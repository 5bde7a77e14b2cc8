"""Object storage in a folder of this machine: a file system of fsspec, and a web server."""

from __future__ import annotations

import os
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fsspec


class Bucket(fsspec.AbstractFileSystem):
    """Object storage in a folder of this machine, which notes its requests and may fail."""

    protocol = "bucket"
    cachable = False
    requests: list[tuple] = []
    failures: list[Exception | bytes] = []
    """What the next requests raise or give instead."""

    def info(self, path, **kwargs):
        self._ask("info", path)
        return {"name": path, "size": os.path.getsize(self._strip_protocol(path))}

    def cat_file(self, path, start=None, end=None, **kwargs):
        instead = self._ask("get", path, start, end)
        if instead is not None:
            return instead
        with open(self._strip_protocol(path), "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def _ask(self, *request):
        self.requests.append(request)
        instead = self.failures.pop(0) if self.failures else None
        if isinstance(instead, Exception):
            raise instead
        return instead


class Ranges(BaseHTTPRequestHandler):
    """A server of one folder that gives ranges, and notes them."""

    folder: Path
    asked: list[str] = []

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str((self.folder / self.path[1:]).stat().st_size))
        self.end_headers()

    def do_GET(self):
        asked = self.headers["Range"]
        self.asked.append(asked)
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        data = (self.folder / self.path[1:]).read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Says nothing."""
