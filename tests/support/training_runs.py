"""Whole runs of the fake stage, as functions that a rank process can be given."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import subprocess
import time
from dataclasses import dataclass

import torch

from megatron_kosmosg.checkpoint.save_and_resume import Checkpointer
from megatron_kosmosg.config.batching import model_parallel_size
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.training.loop import fit
from tests.support.fake_stage import FakeStage


@dataclass(frozen=True)
class SignalAt:
    """Sends `number` to its own process at forward pass `call` of rank `rank`."""

    call: int
    number: int
    rank: int

    def __call__(self, call: int) -> None:
        if call == self.call and int(os.environ["RANK"]) == self.rank:
            os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class SignalWhile:
    """Stage settings that send USR1 to rank `rank`: while it builds `split` (`reads`: while it
    reads its first sample), or at its `call`-th forward pass of an evaluation."""

    rank: int
    split: str | None = None
    reads: bool = False
    call: int | None = None


class InterruptedStage(FakeStage):
    """FakeStage that follows a SignalWhile."""

    def __init__(self, config: RunConfig, when: SignalWhile) -> None:
        super().__init__(config)
        self._when, self._evaluated = when, 0

    def build_dataset(self, split: str):
        dataset = super().build_dataset(split)
        if split == self._when.split:
            if self._when.reads:
                return _SlowFirstSample(dataset, self._hits())
            self._send()
        return dataset

    def forward_step(self, data_iterator, model):
        if not model.training:
            self._evaluated += 1
            if self._evaluated == self._when.call:
                self._send()
        return super().forward_step(data_iterator, model)

    def _send(self) -> None:
        if self._hits():
            os.kill(os.getpid(), signal.SIGUSR1)

    def _hits(self) -> bool:
        return int(os.environ["RANK"]) == self._when.rank


class _SlowFirstSample:
    """A dataset whose first sample takes seconds on one rank, which gets the signal meanwhile."""

    def __init__(self, dataset, hit: bool) -> None:
        self._dataset, self._hit = dataset, hit

    def __getattr__(self, name: str):
        return getattr(self._dataset, name)

    def __getitem__(self, position: int):
        if self._hit:
            self._hit = False
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(3)
        return self._dataset[position]


def train_interrupted(config: RunConfig, when: SignalWhile) -> tuple[bool, float]:
    """(what `fit` returns on this rank, seconds it took)."""
    context = platform.initialize(config)
    started = time.monotonic()
    try:
        return fit(InterruptedStage(config, when), config, context), time.monotonic() - started
    finally:
        platform.teardown()


@dataclass(frozen=True)
class PauseAt:
    """Pauses one rank for `seconds` at forward pass `call`: its main thread, or all of it."""

    call: int
    rank: int
    seconds: float
    whole: bool = False

    def __call__(self, call: int) -> None:
        if call != self.call or int(os.environ["RANK"]) != self.rank:
            return
        if self.whole:
            time.sleep(0.7)  # its signs of life, four a second, have been heard
            wake = f"sleep {self.seconds}; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", wake])
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(self.seconds)


def said_while_training(config: RunConfig, settings: dict | None = None) -> str:
    """What this rank wrote to stderr."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        train(config, settings)
    return output.getvalue()


@dataclass(frozen=True)
class LimitFiles:
    """From forward pass `call` on, no file of this process grows beyond `most_bytes`."""

    call: int
    most_bytes: int

    def __call__(self, call: int) -> None:
        if call == self.call:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.most_bytes, hard))


class Killed(Exception):
    """Stands for a process that ends between two iterations without a goodbye."""


@dataclass(frozen=True)
class KillAt:
    """Raises at forward pass `call`."""

    call: int

    def __call__(self, call: int) -> None:
        if call == self.call:
            raise Killed


def train(config: RunConfig, settings: dict | None = None) -> bool:
    """What `fit` returns on this rank. settings: keyword arguments of the stage."""
    context = platform.initialize(config)
    try:
        return fit(FakeStage(config, **(settings or {})), config, context)
    finally:
        platform.teardown()


def train_until(config: RunConfig, stop: int, settings: dict | None = None) -> None:
    """Trains `stop` updates and ends like a killed run. Four micro-batches an update on one
    replica."""
    replicas = int(os.environ["WORLD_SIZE"]) // model_parallel_size(config)
    try:
        train(config, {**(settings or {}), "hook": KillAt(stop * 4 // replicas)})
    except Killed:
        return
    except RuntimeError as error:  # what a pipeline stage sees when the one before it is gone
        assert "Connection closed by peer" in str(error)
        return
    raise AssertionError("the run was not interrupted")


def run_program(config: RunConfig, settings: dict | None = None) -> tuple[int, str, str]:
    """(exit code, stderr, stdout) of the training program with the fake stage."""
    from megatron_kosmosg import train

    train.build_stage = lambda config, context, *_: FakeStage(config, **(settings or {}))
    train.validate_files = lambda config, facts: None  # the fake stage reads no files
    output, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(shown):
        code = train.run(config)
    return code, output.getvalue(), shown.getvalue()


def run_on_taken_port(config: RunConfig, port: int) -> tuple[int, str, str]:
    """`run_program` as rank 0 of 2 whose port somebody else listens on."""
    os.environ.update(WORLD_SIZE="2", MASTER_PORT=str(port))
    return run_program(config)


def train_and_die_saving(config: RunConfig, iteration: int, rank: int) -> None:
    """Trains until `rank` is killed while checkpoint `iteration` is written but not yet named."""
    dies = int(os.environ["RANK"]) == rank
    complete = Checkpointer._complete

    def killed(self, temporary, base):
        if dies and temporary.name.startswith(f"iter_{iteration:07d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        complete(self, temporary, base)

    Checkpointer._complete = killed
    train(config)


def refused(config: RunConfig, settings: dict | None = None) -> str:
    """The message of the ConfigError that ends the run."""
    try:
        train(config, settings)
    except ConfigError as error:
        return str(error)
    raise AssertionError("the run was not refused")


def beside_torch_adamw(config: RunConfig) -> tuple[list[float], dict, dict]:
    """(learning rates, parameters after torch's AdamW, parameters after `fit`) on the same data.

    The schedule is written out here: 2 warm-up updates to 0.02, then a straight line to 0.
    """
    context = platform.initialize(config)
    try:
        (model,) = FakeStage(config).build_model(context)
        trainable = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(
            trainable,
            lr=1.0,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=config.optimizer.weight_decay,
        )
        dataset = FakeStage(config).build_dataset("train")
        rates = [0.01, 0.02, 0.01, 0.0]
        for iteration, rate in enumerate(rates):
            adam.param_groups[0]["lr"] = rate
            batch = dataset.collate([dataset[8 * iteration + i] for i in range(8)], 3)
            adam.zero_grad()
            (model(batch["inputs"]) - batch["targets"]).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(trainable, config.optimizer.clip_grad)
            adam.step()
        expected = {k: v.numpy() for k, v in model.state_dict().items() if v is not None}
        stage = KeepsItsModel(config)
        fit(stage, config, context)
        got = stage.model.state_dict()
        return rates, expected, {name: got[name].numpy() for name in expected}
    finally:
        platform.teardown()


class KeepsItsModel(FakeStage):
    def build_model(self, context):
        chunks = super().build_model(context)
        self.model = chunks[0]
        return chunks
