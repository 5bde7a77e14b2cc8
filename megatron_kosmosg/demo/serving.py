"""Serves the page until it is ended, in a folder of its own that goes with it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.demo.requests import MAX_UPLOAD_BYTES
from megatron_kosmosg.demo.start_values import StartValues

if TYPE_CHECKING:
    from megatron_kosmosg.demo.studio import Studio

QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_SHARE": "False",  # which would win over a `share` that is not given
}


def check_address(host: str, port: int) -> None:
    """Raises ConfigError, naming the option, where nothing can listen at `host` and `port`: said
    before the model is opened, which may take minutes."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"--host {host}: no such address; 127.0.0.1 is this machine") from error
    with socket.socket(family, kind) as tried:
        # As a server does it: a port that another one has just left can be taken.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                message = (
                    f"--port {port}: another program listens there, perhaps another kosmosg demo"
                )
                raise ConfigError(f"{message}; give another --port") from error
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(f"--host {host}: not an address of this machine") from error
            raise ConfigError(f"--port {port} cannot be used: {error.strerror}") from error


def serve(studio: Studio, start: StartValues, host: str, port: int, share: bool) -> None:
    """Returns after Ctrl-C or SIGTERM. Raises OSError where it cannot listen (`check_address`).

    What is uploaded and drawn lies in a temporary folder, which is removed at the end.
    """
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory(prefix="kosmosg-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "uploads"))  # read when it is imported
        from megatron_kosmosg.demo.demo_page import LAUNCH, build_page

        page = build_page(studio, start, Path(folder))
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            max_file_size=MAX_UPLOAD_BYTES,
            prevent_thread_lock=True,
            quiet=True,
            **LAUNCH,
        )
        print(f"{public or address}  (Ctrl-C ends it)", flush=True)
        ended.wait()
        page.close(verbose=False)
