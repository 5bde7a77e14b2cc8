"""Training runs that are killed at a chosen moment, and the marks that say where they were then.

A rank marks in a small mapped file which phases it is in; the file outlives the kill. The product
runs unchanged: the marks hang on its functions and on the phases that its heartbeat names.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import mmap
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_kosmosg import train
from megatron_kosmosg.checkpoint import writer as checkpoint_writer
from megatron_kosmosg.checkpoint.save_and_resume import Checkpointer
from megatron_kosmosg.checkpoint.writer import BackgroundSave
from megatron_kosmosg.config.paths import packing_folder
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data import packing_index
from megatron_kosmosg.monitoring.watchdog import Watchdog
from megatron_kosmosg.score import service as score_service
from megatron_kosmosg.score import stream as score_stream
from megatron_kosmosg.score.remote import RemoteScore
from megatron_kosmosg.stages import instruct
from tests.support.fake_stage import FakeDataset, FakeStage
from tests.support.tiny_stream import TinyStream

PHASES = (
    "load", "forward", "P2P", "score wait", "scoring", "save", "async finalise", "data build",
)  # fmt: skip
_ITERATION = len(PHASES)
_HEARTBEAT = slice(len(PHASES) + 1, len(PHASES) + 33)
"""Where the marks have the iteration, and the name of the heartbeat's phase."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL of a rank, `delay` seconds after it has entered `phase` for the `entry`-th time."""

    rank: int | None
    """None: the one that gets there first."""
    phase: str
    entry: int
    delay: float


@dataclass(frozen=True)
class Death:
    """Where a rank was when it died."""

    phases: tuple[str, ...]
    """Empty between phases."""
    iteration: int
    heartbeat: str
    """The phase as its heartbeat would have named it."""


def prepare_marks(folder: Path) -> None:
    """Makes `folder` fit for another run."""
    folder.mkdir(exist_ok=True)
    (folder / "victim").unlink(missing_ok=True)


def read_death(folder: Path, rank: int) -> Death:
    """What the marks of a rank say after its end."""
    marks = (folder / f"marks-{rank}").read_bytes()
    phases = tuple(name for name, mark in zip(PHASES, marks, strict=False) if mark)
    return Death(phases, marks[_ITERATION], marks[_HEARTBEAT].decode().strip("\0 "))


@dataclass
class Lived:
    """What a rank that was not killed says at its end."""

    code: int
    """Exit code of the training program."""
    said: str
    """On stderr."""
    parameters: str
    """Hash of all parameters of the model on this rank."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """How long each stay in a phase took, in order."""


def run_marked(world: str, config: RunConfig, marks: str, kill: Kill | None) -> Lived:
    """The training program as this rank, on the stage of `world`: fake | instruct."""
    marker = _Marker(Path(marks), kill)
    built: list[torch.nn.Module] = []
    use_stage(world, built)
    _mark_the_product(marker)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = train.run(config)
    return Lived(code, said.getvalue(), parameters_hash(built), dict(marker.seconds))


class _Marker:
    """The marks of this rank; kills it when its time has come."""

    def __init__(self, folder: Path, kill: Kill | None) -> None:
        self._folder, self._rank = folder, int(os.environ["RANK"])
        with open(folder / f"marks-{self._rank}", "w+b") as file:
            file.truncate(_HEARTBEAT.stop)
            self._marks = mmap.mmap(file.fileno(), 0)
        self._kill, self._lock = kill, threading.Lock()
        sys.setswitchinterval(0.0005)  # so that the thread that kills is not late
        self._entries: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """Several threads may be in phases, and one phase in another."""
        started = time.perf_counter()
        self._change(phase, 1)
        try:
            yield
        finally:
            self._change(phase, -1)
            self.seconds[phase].append(time.perf_counter() - started)

    def heartbeat(self, iteration: int, phase: str) -> None:
        self._marks[_ITERATION], self._marks[_HEARTBEAT] = iteration, phase.encode().ljust(32)

    def _change(self, phase: str, by: int) -> None:
        with self._lock:
            self._marks[PHASES.index(phase)] += by
            self._entries[phase] += by > 0
            if by > 0 and self._is_due(phase):
                threading.Thread(target=_die, args=(self._kill.delay,), daemon=True).start()

    def _is_due(self, phase: str) -> bool:
        kill = self._kill
        if kill is None or kill.phase != phase or kill.entry != self._entries[phase]:
            return False
        if kill.rank is None:
            with contextlib.suppress(FileExistsError), open(self._folder / "victim", "x"):
                return True
            return False
        return kill.rank == self._rank


def _die(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def _mark_the_product(marker: _Marker) -> None:
    def mark(owner: object, name: str, phase: str) -> None:
        setattr(owner, name, _marked(marker, getattr(owner, name), phase))

    mark(P2PCommunicator, "_communicate", "P2P")
    mark(RemoteScore, "_receive", "score wait")
    mark(score_service._Work, "_score", "scoring")
    mark(Checkpointer, "save", "save")
    mark(checkpoint_writer, "_write", "save")
    packing_index.exclusive = _marked_inside(marker, packing_index.exclusive, "data build")
    for stage in (FakeStage, instruct.InstructStage):
        mark(stage, "forward_step", "forward")
    _mark_finalising(marker)
    _mark_heartbeats(marker)


def _marked(marker: _Marker, function: Callable, phase: str) -> Callable:
    @functools.wraps(function)
    def marked(*args, **named):
        with marker.inside(phase):
            return function(*args, **named)

    return marked


def _marked_inside(marker: _Marker, manager: Callable, phase: str) -> Callable:
    @contextlib.contextmanager
    def marked(*args):
        with manager(*args), marker.inside(phase):
            yield

    return marked


def _mark_finalising(marker: _Marker) -> None:
    start = BackgroundSave.start

    def start_marked(self, request):
        request.finalize_fns[:] = [
            _marked(marker, finish, "async finalise") for finish in request.finalize_fns
        ]
        start(self, request)

    BackgroundSave.start = start_marked


def _mark_heartbeats(marker: _Marker) -> None:
    """Follows the heartbeat's own phases; `model` is where a run loads what it goes on from."""
    at, loading = Watchdog.at, contextlib.ExitStack()

    def at_marked(self, iteration: int, phase: str) -> None:
        loading.close()
        if phase == "model":
            loading.enter_context(marker.inside("load"))
        marker.heartbeat(iteration, phase)
        at(self, iteration, phase)

    Watchdog.at = at_marked


def use_stage(world: str, built: list[torch.nn.Module]) -> None:
    """Has this process train the stage of `world` on rows that need no files; `built` gets its
    model."""
    train.validate_files = lambda config, facts: None  # these stages read no files
    if world == "fake":
        train.build_stage = lambda config, context, *_: _PackingStage(config)
    else:
        score_stream.instruct_stream = lambda config, split, *rest: TinyStream(
            "instruct", split, rest[2] if len(rest) > 2 else "all"
        )
        instruct.InstructStage.initial_weights = lambda self: None
    for stage in (_PackingStage, instruct.InstructStage):
        stage.build_model = _kept(stage.build_model, built)


def _kept(build: Callable, built: list[torch.nn.Module]) -> Callable:
    def build_and_keep(self, context):
        built.extend(build(self, context))
        return list(built)

    return build_and_keep


class _PackingStage(FakeStage):
    """FakeStage whose samples are found through a packing index, built by who needs it first."""

    def build_dataset(self, split: str) -> FakeDataset:
        return _IndexedDataset(split, packing_folder(self.config) / f"epoch0-{split}")


class _IndexedDataset(FakeDataset):
    def __init__(self, split: str, folder: Path) -> None:
        super().__init__(split)
        self._folder, self._lock = folder, threading.Lock()
        self._index: packing_index.EpochIndex | None = None

    def __getitem__(self, position: int) -> torch.Tensor:
        with self._lock:
            if self._index is None:
                self._index = packing_index.load_or_build(self._folder, _write_index)
        return super().__getitem__(int(self._index.documents[position]))


def _write_index(folder: Path) -> None:
    writer = packing_index.EpochIndexWriter(folder, capacity=16)
    documents = np.random.default_rng(5).permutation(200_000)
    for block in documents.reshape(100, -1):
        ends = (np.arange(len(block)) + 1) * 8
        writer.add(block, ends, ends)
    writer.finish()


def parameters_hash(chunks: list[torch.nn.Module]) -> str:
    """Of all parameters, frozen ones too."""
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        for name, parameter in sorted(chunk.named_parameters()):
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()
