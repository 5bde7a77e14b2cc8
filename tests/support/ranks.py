"""Runs a function on several gloo ranks of this machine.

Unless told otherwise the ranks are forked from one server process that has already imported torch
and Megatron-Core: starting an interpreter for each would cost some 15 CPU-seconds a rank.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

# A spawned rank imports this module first, and the function that it runs after: that one's module
# may import Megatron-Core before this package, which would hide nothing from it any more.
import megatron_kosmosg  # noqa: F401 - hides what cannot run here, as the comment says

_PRELOAD = [
    "megatron_kosmosg.parallel",
    "torch",
    "transformers.models.clip.modeling_clip",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.models.common.language_module.language_module",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.transformer_block",
    "megatron_kosmosg.models.diffusion",
    "megatron_kosmosg.stages.instruct",
    "megatron_kosmosg.training.loop",
]

_PORTS = range(20000, 32768)
"""Below Linux's ephemeral ports (net.ipv4.ip_local_port_range)."""
_SYSTEM_RANDOM = random.SystemRandom()


def run_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 240,
    start_method: str = "forkserver",
) -> list:
    """What `function(*args)` returns on every rank, in rank order.

    Each rank has torchrun's environment variables, so the product's own start-up code runs. Both
    the function and its results must pickle. The first error of any rank is raised here, with its
    traceback, and the other ranks are ended; so they are after `timeout` seconds.

    start_method: "spawn" for ranks that use a GPU, or see none because of the environment: a
    process that was forked from one that has asked CUDA anything cannot use it.
    """
    processes, pipes = _start(num_ranks, function, args, start_method)
    try:
        return _collect(pipes, num_ranks, timeout)
    finally:
        _end(processes, patience=5)


@dataclass(frozen=True)
class Ended:
    """How a rank ended that was left to itself."""

    exit_code: int
    """Of the process; -N where signal N ended it."""
    answer: Any = None
    """What the function returned."""
    error: str | None = None
    """Traceback of what it raised."""
    at: float = 0.0
    """time.monotonic() when it had answered, or was gone."""


def run_ranks_until_they_end(
    num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 240
) -> list[Ended]:
    """How every rank ended: none is ended from here because of another.

    Raises TimeoutError, and ends what is left, when a rank is still there after `timeout` seconds.
    """
    processes, pipes = _start(num_ranks, function, args)
    ended: dict[int, Ended] = {}
    deadline = time.monotonic() + timeout
    try:
        while pipes:
            ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"after {timeout} s rank {_names(pipes)} had not ended")
            for pipe in ready:
                rank = pipes.pop(pipe)
                error, answer = None, None
                with contextlib.suppress(EOFError):
                    error, answer = pipe.recv()
                process = processes[rank]
                at = time.monotonic()
                process.join(timeout=max(1.0, deadline - at))
                ended[rank] = Ended(process.exitcode, answer, error, at)
        if any(process.is_alive() for process in processes):
            raise TimeoutError(f"after {timeout} s a rank had answered but not ended")
    finally:
        _end(processes, patience=0)
    return [ended[rank] for rank in range(num_ranks)]


def _start(
    num_ranks: int, function: Callable[..., Any], args: tuple, start_method: str = "forkserver"
) -> tuple[list[BaseProcess], dict[Connection, int]]:
    """(the ranks' processes, the rank at the other end of each pipe)."""
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    port = free_port()
    processes, pipes = [], {}
    for rank in range(num_ranks):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, num_ranks, port, send, function, args))
        process.start()
        send.close()
        processes.append(process)
        pipes[receive] = rank
    return processes, pipes


def _end(processes: list[BaseProcess], patience: float) -> None:
    for process in processes:
        process.join(timeout=patience)
        if process.is_alive():
            process.kill()
            process.join()


def _names(pipes: dict[Connection, int]) -> str:
    return ", ".join(str(rank) for rank in sorted(pipes.values()))


def free_port() -> int:
    """A TCP port that nobody uses at the moment.

    Never one that the system gives to outgoing connections: another program would have it by the
    time a rank listens. Drawn by the system, as two suites side by side seed `random` alike.
    """
    while True:
        port = _SYSTEM_RANDOM.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _collect(pipes: dict, num_ranks: int, timeout: float) -> list:
    results: list[Any] = [None] * num_ranks
    deadline = time.monotonic() + timeout
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(
                f"after {timeout} s no answer from rank {_names(pipes)} of {num_ranks}"
            )
        for pipe in ready:
            rank = pipes.pop(pipe)
            try:
                error, result = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} of {num_ranks} died without an answer") from None
            if error is not None:
                raise RuntimeError(f"rank {rank} of {num_ranks} failed:\n{error}") from None
            results[rank] = result
    return results


def _rank(rank: int, num_ranks: int, port: int, send, function: Callable, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        answer = (None, function(*args))
    except Exception:
        answer = (traceback.format_exc(), None)
    send.send(answer)
    send.close()
