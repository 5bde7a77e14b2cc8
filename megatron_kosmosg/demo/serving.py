"""Serves the page until it is ended, in a folder of its own that goes with it."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from pathlib import Path

from megatron_kosmosg.demo.requests import MAX_UPLOAD_BYTES
from megatron_kosmosg.demo.start_values import StartValues
from megatron_kosmosg.demo.studio import Studio

QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_SHARE": "False",  # which would win over a `share` that is not given
}


def serve(studio: Studio, start: StartValues, host: str, port: int, share: bool) -> None:
    """Returns after Ctrl-C or SIGTERM. Raises OSError where it cannot listen at `host` and `port`.

    What is uploaded and drawn lies in a temporary folder, which is removed at the end.
    """
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory(prefix="kosmosg-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "uploads"))  # read when it is imported
        from megatron_kosmosg.demo.page import LAUNCH, build_page

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
