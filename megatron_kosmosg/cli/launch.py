"""`kosmosg launch`: a command on several ranks of this machine, or of several.

In place of `torchrun --standalone`, whose agent keeps a store that listens on every interface and
unpickles what any client sets. Here the ranks meet on 127.0.0.1, at a port that is bound before
they start, and there is no agent; a rank that fails is not started again. On several machines one
launcher runs on each, and the ranks meet at the address of the first.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    command_parser,
    natural_int,
    positive_int,
)
from megatron_kosmosg.launcher import LISTENER

EPILOG = """\
examples:
  kosmosg launch --ranks 2 train --config toy_pretrain logging.output_dir=runs/pretrain
  kosmosg launch --ranks 8 generate --model exported --prompts prompts.jsonl --output drawn
  kosmosg launch --ranks 8 --nodes 4 --node-rank 1 --address node0:29500 train --config F.yaml

Signals go on to all ranks: after SIGTERM, SIGUSR1 or Ctrl-C training saves its state. The exit code
is that of the rank that failed first; ranks that do not end by themselves then are ended.
"""

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_POLL_SECONDS = 0.1
_OWN_END_SECONDS = {exit_codes.STOPPED: 120.0}
"""How long the other ranks may take to end by themselves after the first one; else:"""
_AFTER_FAILURE_SECONDS = 10.0
_AFTER_TERM_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent dies."""


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser(
        "launch", "Starts a command on several ranks of this machine, or of several.", EPILOG
    )
    parser.add_argument("--ranks", type=positive_int, required=True, help="processes to start")
    parser.add_argument(
        "--nodes", type=positive_int, default=1, metavar="N", help="machines with as many ranks (1)"
    )
    parser.add_argument(
        "--node-rank", type=natural_int, default=0, metavar="R", help="which of them this is (0)"
    )
    parser.add_argument(
        "--address",
        type=_host_and_port,
        metavar="HOST:PORT",
        help="where the ranks of several machines meet: the first machine, and a free port there",
    )
    parser.add_argument("command", help="a command of kosmosg, such as train")
    own = parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own")
    own.required = False  # argparse would say that they are
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the rank that failed first; 0 if none did."""
    from megatron_kosmosg.cli.main import COMMANDS

    parser = build_parser()
    args = parser.parse_args(arguments)
    known = {name.split()[0] for name in COMMANDS} - {"launch"}
    if args.command not in known:
        parser.error(f"no command {args.command}; there are {', '.join(sorted(known))}")
    if args.node_rank >= args.nodes:
        parser.error(f"--node-rank {args.node_rank} of --nodes {args.nodes}: they count from 0")
    if (args.address is None) != (args.nodes == 1):
        parser.error("--nodes above 1 and --address belong together")
    command = [sys.executable, "-m", "megatron_kosmosg", args.command, *args.arguments]
    with socket.socket() as listener:
        address = args.address
        if address is None:
            listener.bind(("127.0.0.1", 0))
            listener.listen(socket.SOMAXCONN)  # the ranks ask while rank 0 is still loading
            address = listener.getsockname()
        ranks = [
            _start(
                command,
                {
                    "RANK": args.node_rank * args.ranks + local_rank,
                    "LOCAL_RANK": local_rank,
                    "WORLD_SIZE": args.nodes * args.ranks,
                    "LOCAL_WORLD_SIZE": args.ranks,
                    "MASTER_ADDR": address[0],
                    "MASTER_PORT": address[1],
                },
                listener if args.nodes == 1 and local_rank == 0 else None,
            )
            for local_rank in range(args.ranks)
        ]
    with _passing_on(ranks):
        return _wait(ranks)


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as node0:29500")
    return host.strip("[]"), int(port)


def _start(
    command: list[str], coordinates: dict[str, object], listener: socket.socket | None
) -> subprocess.Popen:
    """Starts one rank's process. `coordinates` holds the variables that say which rank it is;
    `listener` is the socket at which the other ranks arrive, for the rank that has it."""
    variables = {name: str(value) for name, value in coordinates.items()}
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
    environment.pop(LISTENER, None)
    inherited = ()
    if listener is not None:
        environment[LISTENER] = str(listener.fileno())
        inherited = (listener.fileno(),)
    # A group of its own keeps the terminal's Ctrl-C away from a rank: it gets the one passed on.
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=inherited,
        process_group=0,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def _passing_on(ranks: list[subprocess.Popen]) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        _send(ranks, number)

    previous = {number: signal.signal(number, pass_on) for number in FORWARDED}
    try:
        yield
    finally:
        _send(ranks, signal.SIGKILL)  # none is left, unless this process itself failed
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen]) -> int:
    first, deadline, is_terminating = exit_codes.DONE, float("inf"), False
    while any(rank.poll() is None for rank in ranks):
        now = time.monotonic()
        if first == exit_codes.DONE:
            first = _failed(ranks)
            if first != exit_codes.DONE:
                deadline = now + _OWN_END_SECONDS.get(first, _AFTER_FAILURE_SECONDS)
        elif now > deadline:
            _send(ranks, signal.SIGKILL if is_terminating else signal.SIGTERM)
            is_terminating, deadline = True, now + _AFTER_TERM_SECONDS
        time.sleep(_POLL_SECONDS)
    return first if first != exit_codes.DONE else _failed(ranks)


def _failed(ranks: list[subprocess.Popen]) -> int:
    """The exit code of a rank that has failed, as a shell says it; 0 while none has."""
    codes = [rank.returncode for rank in ranks if rank.poll() not in (None, exit_codes.DONE)]
    # Of those that ended between two looks, one that a signal ended took the others with it.
    for code in sorted(codes):
        return 128 - code if code < 0 else code
    return exit_codes.DONE


def _send(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)
