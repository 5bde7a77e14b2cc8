"""The link between decoder and score ranks on four engines, over loopback, at real sizes.

One process sends conditions (16 x 77 x 768, bf16), another answers each with a gradient (fp32). In
turn, so that a change of the machine's speed meets all: gloo (what the link once was: two process
groups, no encryption), ZeroMQ with CURVE (score/fleet.py and score/member.py as a run uses them)
and without, and gRPC with TLS. Prints seconds of a round trip, throughput with several under way,
CPU seconds of both ends per GB, and the ratios to gloo.

    OMP_NUM_THREADS=1 python -m benchmarks.score_link --rounds 3
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_kosmosg.score.wire import memory

SHAPE, ROWS = (77, 768), 16
WINDOW = 4
"""Requests under way while throughput is measured."""
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Measured:
    """Of one engine in one round."""

    latency: float
    """Median seconds of a round trip, one at a time."""
    rate: float
    """Round trips a second, WINDOW under way."""
    cpu: float
    """CPU seconds of both processes per GB that passed."""


Ask = Callable[[torch.Tensor], Any]
Take = Callable[[Any], torch.Tensor]


def gradient() -> torch.Tensor:
    return torch.ones(ROWS, *SHAPE)


def measure(ask: Ask, take: Take, times: int) -> tuple[list[float], float, int]:
    """(seconds of single round trips, round trips a second, bytes) of `ask` and `take`."""
    condition = torch.ones(ROWS, *SHAPE, dtype=torch.bfloat16)
    singles = []
    for _ in range(times):
        started = time.perf_counter()
        assert take(ask(condition))[-1] == 1
        singles.append(time.perf_counter() - started)
    started, under_way = time.perf_counter(), []
    for _ in range(times):
        under_way.append(ask(condition))
        if len(under_way) == WINDOW:
            take(under_way.pop(0))
    for number in under_way:
        take(number)
    rate = times / (time.perf_counter() - started)
    return singles[2:], rate, 2 * times * (condition.nbytes + gradient().nbytes)


# ---- gloo ---------------------------------------------------------------------------------------


def _pairs(end: int, port: int) -> list[Any]:
    from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

    store = TCPStore(HOST, port, 2, is_master=end == 0, timeout=timedelta(seconds=60))
    patience = timedelta(seconds=60)
    groups = [ProcessGroupGloo(PrefixStore(n, store), end, 2, patience) for n in ("out", "back")]
    return [store, *groups]


def gloo_server(pipe: Connection, times: int) -> None:
    _, out, back = _pairs(1, pipe.recv())
    condition = torch.empty(ROWS, *SHAPE, dtype=torch.bfloat16)
    pending = []
    for _ in range(2 * times):
        out.recv([condition], 0, 0).wait()
        answer = gradient()
        pending.append((back.send([answer], 0, 0), answer))
        if len(pending) > WINDOW:
            pending.pop(0)[0].wait()
    for work, _ in pending:
        work.wait()


def gloo_client(pipe: Connection, times: int) -> tuple[list[float], float, int]:
    from tests.support.ranks import free_port

    port = free_port()
    pipe.send(port)
    _, out, back = _pairs(0, port)

    def take(work: Any) -> torch.Tensor:
        answer = torch.empty(ROWS, *SHAPE)
        back.recv([answer], 1, 0).wait()
        work.wait()
        return answer.flatten()

    return measure(lambda condition: out.send([condition], 1, 0), take, times)


# ---- ZeroMQ -------------------------------------------------------------------------------------


def _limits() -> Any:
    from megatron_kosmosg.score.wire import Limits

    return Limits(ROWS, SHAPE, torch.bfloat16, 512)


def _without_encryption() -> None:
    """As a comparison: both ends of ZeroMQ without CURVE, which no run can have."""
    import zmq

    from megatron_kosmosg.score.fleet import Fleet
    from megatron_kosmosg.score.member import Membership

    connect = Membership._connect

    def plain_listen(self: Fleet, secret: tuple[bytes, bytes]) -> Any:
        router = self._context.socket(zmq.ROUTER)
        router.router_mandatory = router.router_handover = True
        return router

    def plain_connect(self: Membership, *about: Any) -> Any:
        made = connect(self, *about)
        made.curve_server = False  # and with it CURVE: the last option that says how decides
        return made

    Fleet._listen, Membership._connect = plain_listen, plain_connect


def plain_server(pipe: Connection, times: int) -> None:
    _without_encryption()
    zeromq_server(pipe, times)


def plain_client(pipe: Connection, times: int) -> tuple[list[float], float, int]:
    _without_encryption()
    return zeromq_client(pipe, times)


def zeromq_server(pipe: Connection, times: int) -> None:
    from megatron_kosmosg.score.member import DecoderAddress, Membership
    from megatron_kosmosg.score.messages import Answer
    from megatron_kosmosg.score.roster import Standing

    address, server, key = pipe.recv()
    to = [DecoderAddress(0, address, server)]
    about = to, key, _limits(), "server", "CPU"
    with Membership(*about, lambda _: Standing.OWN, silence_seconds=60.0) as member:
        member.is_loaded({})
        while member.end is None:
            request = member.take(1.0)
            if request is not None:
                member.reply(request, Answer(0.0, 0, 0, 0.0, 0.0, gradient().flatten()))


def zeromq_client(pipe: Connection, times: int) -> tuple[list[float], float, int]:
    import zmq

    from megatron_kosmosg.score.fleet import Fleet, Patience
    from megatron_kosmosg.score.messages import Kind, Rows, ScoreRequest
    from megatron_kosmosg.score.wire import RunEnd

    secret, key = zmq.curve_keypair(), zmq.curve_keypair()
    fleet = Fleet(HOST, secret, _limits(), Patience(60, 60, 60))
    pipe.send((f"tcp://{HOST}:{fleet.port}", secret[0].decode(), key))
    fleet.admit(key[0])
    rows, scale = Rows(tuple(range(ROWS)), (0,) * ROWS), torch.ones(())

    def ask(condition: torch.Tensor) -> int:
        return fleet.submit(ScoreRequest(Kind.GRADIENT, rows, condition, scale), lambda: True)

    measured = measure(ask, lambda number: fleet.take(number).payload, times)
    fleet.close(RunEnd.DONE)
    return measured


# ---- gRPC ---------------------------------------------------------------------------------------

_METHOD = "/score/Answer"
_OPTIONS = [(f"grpc.max_{way}_message_length", 1 << 26) for way in ("send", "receive")]


def grpc_server(pipe: Connection, times: int) -> None:
    import grpc

    key, certificate = pipe.recv()
    handler = grpc.unary_unary_rpc_method_handler(lambda *_: bytes(memory(gradient())))

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return handler if details.method == _METHOD else None

    server = grpc.server(futures.ThreadPoolExecutor(2), options=_OPTIONS)
    server.add_generic_rpc_handlers((Handler(),))
    credentials = grpc.ssl_server_credentials([(key, certificate)])
    pipe.send(server.add_secure_port(f"{HOST}:0", credentials))
    server.start()
    pipe.recv()
    server.stop(None)


def grpc_client(pipe: Connection, times: int) -> tuple[list[float], float, int]:
    import grpc

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("key.pem", "certificate.pem")]
        made = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(files[0]), "-out", str(files[1])]
        named = ["-subj", "/CN=localhost", "-addext", f"subjectAltName=IP:{HOST}", "-days", "1"]
        subprocess.run(["openssl", "req", "-x509", *made, *named], check=True, capture_output=True)
        key, certificate = (file.read_bytes() for file in files)
    pipe.send((key, certificate))
    credentials = grpc.ssl_channel_credentials(certificate)
    with grpc.secure_channel(f"{HOST}:{pipe.recv()}", credentials, _OPTIONS) as channel:
        call = channel.unary_unary(_METHOD)

        def take(future: Any) -> torch.Tensor:
            return torch.frombuffer(bytearray(future.result()), dtype=torch.float32)

        measured = measure(lambda c: call.future(bytes(memory(c))), take, times)
    pipe.send("done")
    return measured


ENGINES = {
    "gloo": (gloo_client, gloo_server),
    "ZeroMQ open": (plain_client, plain_server),
    "ZeroMQ CURVE": (zeromq_client, zeromq_server),
    "gRPC TLS": (grpc_client, grpc_server),
}


def _end(function: Callable, pipe: Connection, times: int, report: Connection) -> None:
    torch.set_num_threads(1)
    before = time.process_time()
    found = function(pipe, times)
    report.send((found, time.process_time() - before, resource.getrusage(0).ru_maxrss))


def one_round(engine: str, times: int) -> Measured:
    context = multiprocessing.get_context("spawn")
    pipes = context.Pipe()
    reports, processes = [], []
    for function, pipe in zip(ENGINES[engine], pipes, strict=True):
        receive, send = context.Pipe(duplex=False)
        # Daemons: where one end fails, the other does not outlive the benchmark.
        processes.append(
            context.Process(target=_end, args=(function, pipe, times, send), daemon=True)
        )
        processes[-1].start()
        reports.append(receive)
    (client, first, _), (_, second, _) = (report.recv() for report in reports)
    for process in processes:
        process.join()
    singles, rate, num_bytes = client
    return Measured(statistics.median(singles), rate, (first + second) / num_bytes * 1e9)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of all engines in turn (3)")
    parser.add_argument("--times", type=int, default=100, help="round trips in each way (100)")
    parser.add_argument(
        "--engines", default=",".join(ENGINES), type=lambda names: names.split(","), metavar="A,B"
    )
    args = parser.parse_args(arguments)
    found: dict[str, list[Measured]] = {engine: [] for engine in args.engines}
    for _ in range(args.rounds):
        for engine in found:
            found[engine].append(one_round(engine, args.times))
    print(f"{'':14} round trip  throughput  CPU s/GB   (ratios to gloo)")
    base = None
    for engine, rounds in found.items():
        middle = [
            statistics.median(getattr(r, n) for r in rounds) for n in Measured.__annotations__
        ]
        base = base or middle
        ratios = ", ".join(f"{value / of:.2f}" for value, of in zip(middle, base, strict=True))
        latency, rate, cpu = middle
        print(f"{engine:14} {1e3 * latency:7.2f} ms {rate:8.1f}/s {cpu:9.2f}   ({ratios})")


if __name__ == "__main__":
    main()
