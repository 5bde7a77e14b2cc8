"""A stand-in for `python` whose programs begin with torch and Megatron-Core already imported.

Slurm starts the client (a small script), which hands its arguments, environment and open files to a
server of this machine. The server forks; signals, the exit code and a sudden end of the client pass
through. Importing costs some 15 CPU-seconds otherwise, for every rank of every start of a job.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from tests.support.local_slurm import die_with_parent

REPOSITORY = Path(__file__).parents[2]
PRELOADED = (
    "megatron_kosmosg.planning.dry_run",
    "megatron_kosmosg.models.diffusion",
    "megatron_kosmosg.stages.instruct",
    "megatron_kosmosg.stages.pretrain",
    "megatron_kosmosg.training.loop",
    "megatron_kosmosg.inspection.inspection_page",
    "diffusers.utils.logging",
    "transformers.utils.logging",
    "nvidia.dali.fn",
)

CLIENT = """\
#!{python} -SE
import json, os, signal, socket, struct, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [struct.pack("!I", len(request))], [0, 1, 2])
server.sendall(request)
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
code = json.loads(server.recv(64) or "1")
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class PreloadedPython:
    """Context manager; `venv` is a folder that looks like a virtual environment."""

    def __init__(self, folder: Path) -> None:
        self.venv = folder
        self._address = str(folder / "socket")

    @property
    def server(self) -> int:
        """Process id of the server: the parent of all programs."""
        return self._server.pid

    def __enter__(self) -> PreloadedPython:
        python = self.venv / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(CLIENT.format(python=sys.executable, address=self._address))
        python.chmod(0o755)
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.preloaded_python", self._address],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        assert self._server.stdout is not None
        if self._server.stdout.readline() != "ready\n":
            raise RuntimeError("the server of preloaded programs did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait()


def serve(address: str) -> None:
    """Forks a program for each client until it is killed."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # DALI has no wheel on every machine
            importlib.import_module(name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    print("ready", flush=True)
    programs: dict[int, tuple[int, socket.socket]] = {}  # {pidfd: (process, client)}
    clients: dict[socket.socket, int] = {}  # {client: process}
    while True:
        readable, _, _ = select.select([listening, *programs, *clients], [], [])
        for ready in readable:
            if ready is listening:
                client, _ = listening.accept()
                process = _start(client, [listening, *clients])
                programs[os.pidfd_open(process)] = (process, client)
                clients[client] = process
            elif isinstance(ready, int):
                process, client = programs.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                if clients.pop(client, None) is not None:
                    client.sendall(json.dumps(code).encode())
                client.close()
            elif ready in clients:
                _pass_on(ready, clients)


def _pass_on(client: socket.socket, clients: dict[socket.socket, int]) -> None:
    """Gives the program its client's signals; a client that is gone takes it along."""
    try:
        numbers = client.recv(16)
    except ConnectionResetError:
        numbers = b""
    for number in numbers or [signal.SIGKILL]:
        os.kill(clients[client], number)
    if not numbers:
        del clients[client]


def _start(client: socket.socket, others: list[socket.socket]) -> int:
    header, files, _, _ = socket.recv_fds(client, 4, 3)
    length, request = int.from_bytes(header, "big"), b""
    while len(request) < length:
        request += client.recv(length - len(request))
    process = os.fork()
    if process == 0:
        for other in [client, *others]:
            other.close()
        os._exit(_run(files, *json.loads(request)))
    for file in files:
        os.close(file)
    return process


def _run(files: list[int], arguments: list[str], environment: dict[str, str], cwd: str) -> int:
    """Runs `python ARGUMENTS` in this process; its exit code."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    # Python has read the variable at the start of the process that this one is forked from.
    given = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [folder for folder in given if folder and folder not in sys.path]
    sys.stdout.reconfigure(line_buffering=True)
    code: object = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    serve(sys.argv[1])
