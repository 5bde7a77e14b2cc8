"""Notices of a run: what a webhook and a command are told, and that neither can harm the run."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from megatron_kosmosg import exit_codes
from megatron_kosmosg.monitoring.notice import Notices


class Hook(BaseHTTPRequestHandler):
    """Keeps what is posted; answers with the status of its server."""

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.posted.append(json.loads(self.rfile.read(length)))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hook():
    server = HTTPServer(("127.0.0.1", 0), Hook)
    server.posted, server.status = [], 200
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(server: HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}/services/SECRET"


@pytest.mark.parametrize(
    ("code", "event", "error"),
    [
        (exit_codes.DONE, "end", None),
        (exit_codes.STOPPED, "stop", None),
        (exit_codes.FAILURE, "failure", "RuntimeError: no memory"),
    ],
)
def test_a_webhook_is_told_the_start_and_the_end(hook, tmp_path, code, event, error):
    output: list[str] = []
    notices = Notices(address(hook), "align", tmp_path, output.append)
    notices.started()
    if error:
        (tmp_path / "failure.txt").write_text(f"rank 3 failed:\nTraceback\n{error}\n")
    notices.ended(code)
    first, last = hook.posted
    assert first["event"] == "start" and first["run"] == str(tmp_path)
    assert (last["event"], last["exit_code"], last["error"]) == (event, code, error)
    assert last["text"].startswith(f"align in {tmp_path}: {event}") and not output


def test_a_command_gets_the_same_on_stdin(tmp_path):
    told = tmp_path / "told file"
    Notices(f"tee -a '{told}'", "instruct", tmp_path, pytest.fail).started()
    assert json.loads(told.read_text())["event"] == "start"


def test_nothing_is_told_without_a_target(tmp_path):
    notices = Notices(None, "align", tmp_path, pytest.fail)
    notices.started()
    notices.ended(exit_codes.DONE)


def test_what_does_not_get_through_is_one_line_without_the_secret(hook, tmp_path):
    output: list[str] = []
    hook.status = 403
    Notices(address(hook), "align", tmp_path, output.append).started()
    for target in ("nothing-of-this-name x", "false", "open 'quote"):
        Notices(target, "align", Path("run"), output.append).ended(1)
    assert len(output) == 4 and all("did not get through to" in line for line in output)
    assert "127.0.0.1" in output[0] and "403" in output[0] and "SECRET" not in output[0]
