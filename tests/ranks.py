"""Runs a function on several gloo ranks of this machine.

The ranks are forked from one server process that has already imported torch and Megatron-Core:
starting an interpreter for each would cost some 15 CPU-seconds a rank.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

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
]


def run_ranks(
    num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 240
) -> list:
    """What `function(*args)` returns on every rank, in rank order.

    Each rank has torchrun's environment variables, so the product's own start-up code runs. Both
    the function and its results must pickle. The first error of any rank is raised here, with its
    traceback, and the other ranks are ended; so they are after `timeout` seconds.
    """
    context = multiprocessing.get_context("forkserver")
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
    try:
        return _collect(pipes, num_ranks, timeout)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _collect(pipes: dict, num_ranks: int, timeout: float) -> list:
    results: list[Any] = [None] * num_ranks
    deadline = time.monotonic() + timeout
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = ", ".join(str(rank) for rank in sorted(pipes.values()))
            raise TimeoutError(f"after {timeout} s no answer from rank {late} of {num_ranks}")
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
