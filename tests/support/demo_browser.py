"""`kosmosg demo` as a process of its own, and a headless Chromium that looks at it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("gradio", "gradio_client", "playwright") if find_spec(name) is None]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """(address, process) once the page answers; `folder` takes its temporary files."""
    port = free_port()
    log = folder / "demo.log"
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "megatron_kosmosg", "demo"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            stdout=out, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            if process.poll() is not None or "Ctrl-C ends it" in log.read_text():
                break
            time.sleep(0.2)
        assert process.poll() is None and "Ctrl-C ends it" in log.read_text(), log.read_text()
        urllib.request.urlopen(address, timeout=20).close()
        yield address, process
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def browser(width: int = 1280, height: int = 1000) -> Iterator:
    """A context of Debian's Chromium, in which pages are opened."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        context = started.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(60_000)
        yield context
        started.close()
