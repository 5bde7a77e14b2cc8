"""Whole runs of the training program with score ranks, and what befalls one rank meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from megatron_kosmosg import train
from megatron_kosmosg.data.instruct_stream import InstructStream
from megatron_kosmosg.models import diffusion
from megatron_kosmosg.models.diffusion import FrozenDiffusion
from megatron_kosmosg.score import rank as score_rank
from megatron_kosmosg.score.loss import DenoisingLoss
from megatron_kosmosg.stages import instruct
from megatron_kosmosg.training import setup
from tests.support.shares import unwrap_model


@dataclass(frozen=True)
class Event:
    """What happens on rank `rank` at its `call`-th piece of training work: a micro-batch's forward
    pass on a decoder rank, its loss on a score rank."""

    rank: int
    call: int
    what: Literal["raise", "freeze"] | signal.Signals
    seconds: float = 0.0
    """How long `freeze` lasts: the whole process, as a machine that hangs."""

    def happen(self) -> None:
        if self.what == "raise":
            raise ArithmeticError("this rank's own trouble")
        if self.what == "freeze":
            subprocess.Popen(["sh", "-c", f"sleep {self.seconds}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            os.kill(os.getpid(), self.what)


@dataclass(frozen=True)
class Outcome:
    """What a run left on one rank."""

    code: int
    said: str
    """On stderr."""
    seconds: float
    model: tuple[str, ...]
    """Parameters of the decoder's model on this rank."""
    diffusion: tuple[str, ...]
    """Parameters of U-Net and VAE on this rank."""
    frozen_changed: bool
    """Whether any weight of U-Net, VAE or the frozen part of the model did."""
    frozen_with_buffers: tuple[str, ...]
    """Frozen parameters that have a gradient, a gradient buffer or a place in the optimizer."""
    trained: int
    """Parameters that have a place in the optimizer."""
    read: frozenset[str]
    """What this rank read of the training data: the tensors in its batches that held anything."""


def program(arguments: list[str], event: Event | None = None) -> Outcome:
    """`python -m megatron_kosmosg.train ARGUMENTS` as this rank, with `event` on the way."""
    watched = _Watched()
    _watch(watched)
    if event is not None and event.rank == int(os.environ["RANK"]):
        _arrange(event)
    said, started = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(said):
        code = train.main(arguments)
    seconds = time.monotonic() - started
    frozen = watched.frozen()
    return Outcome(
        code=code,
        said=said.getvalue(),
        seconds=seconds,
        model=tuple(name for chunk in watched.chunks for name, _ in chunk.named_parameters()),
        diffusion=tuple(
            name
            for diffusion in watched.diffusions
            for part in (diffusion.unet, diffusion.vae)
            for name, _ in part.named_parameters()
        ),
        frozen_changed=watched.before != {name: _digest(p) for name, p in frozen.items()},
        frozen_with_buffers=tuple(name for name, p in frozen.items() if watched.has_buffers(p)),
        trained=len(watched.in_optimizer()),
        read=frozenset(watched.read),
    )


class _Watched:
    """What the run built on this rank."""

    def __init__(self) -> None:
        self.diffusions: list[FrozenDiffusion] = []
        self.chunks: list[nn.Module] = []
        self.optimizer = None
        self.before: dict[str, str] = {}
        self.read: set[str] = set()

    def frozen(self) -> dict[str, nn.Parameter]:
        parts = [part for d in self.diffusions for part in (d.unet, d.vae)] + self.chunks
        return {
            f"{number}.{name}": parameter
            for number, part in enumerate(parts)
            for name, parameter in part.named_parameters()
            if not parameter.requires_grad
        }

    def in_optimizer(self) -> set[int]:
        """`id` of the parameters that the optimizer updates, before they are split or copied."""
        if self.optimizer is None:
            return set()
        held = set()
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            if hasattr(part, "model_param_gbuf_map"):
                held |= {id(parameter) for parameter in part.model_param_gbuf_map}
            else:
                held |= {id(p) for group in part.param_groups for p in group["params"]}
        return held

    def has_buffers(self, parameter: nn.Parameter) -> bool:
        return (
            parameter.grad is not None
            or hasattr(parameter, "main_grad")
            or id(parameter) in self.in_optimizer()
        )


def _watch(watched: _Watched) -> None:
    load_diffusion, build_optimizer = diffusion.load_diffusion, setup.build_optimizer
    collate = InstructStream.collate

    def collect(self, samples, pad_to, replacements=None):
        batch = collate(self, samples, pad_to, replacements)
        if self._stage == "instruct/train":
            watched.read |= {name for name, tensor in batch.items() if tensor.numel()}
        return batch

    def load(*arguments):
        watched.diffusions.append(load_diffusion(*arguments))
        watched.before |= {name: _digest(p) for name, p in watched.frozen().items()}
        return watched.diffusions[-1]

    def build(config, chunks):
        watched.chunks = unwrap_model(chunks)
        watched.before = {name: _digest(p) for name, p in watched.frozen().items()}
        watched.optimizer = build_optimizer(config, chunks)
        return watched.optimizer

    instruct.load_diffusion = score_rank.load_diffusion = load
    setup.build_optimizer = build
    InstructStream.collate = collect


def _arrange(event: Event) -> None:
    forward, denoise = instruct.InstructStage.forward_step, DenoisingLoss.__call__
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == event.call:
            event.happen()

    def forward_step(self, data_iterator, model):
        if model.training:
            count()
        return forward(self, data_iterator, model)

    def loss(self, condition, *arguments):
        if condition.requires_grad:
            count()
        return denoise(self, condition, *arguments)

    instruct.InstructStage.forward_step, DenoisingLoss.__call__ = forward_step, loss


def _digest(parameter: torch.Tensor) -> str:
    flat = parameter.detach().float().contiguous().numpy()
    return hashlib.blake2b(flat.tobytes(), digest_size=12).hexdigest()
