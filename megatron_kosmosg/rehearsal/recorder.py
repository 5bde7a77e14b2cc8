"""Counts what one update did, by phase of the program, and which line of it did so."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

from megatron_kosmosg.rehearsal.device_memory import DeviceMemory

_HERE = str(Path(__file__).parent)
_PACKAGE = f"{Path(__file__).parents[1]}/"
_BESIDE_THE_PACKAGE = f"{Path(__file__).parents[2]}/"
_LIBRARIES = "site-packages/"
_UNSEEN = (_HERE, f"{Path(torch.__file__).parent}/", "<")
"""Frames that say nothing about the program: this package, torch, code made at run time."""


@dataclass
class CollectiveCount:
    """How much passed through one kind of collective on one group."""

    calls: int = 0
    num_bytes: int = 0
    """In this rank's buffers, inputs and outputs."""


@dataclass
class Phase:
    """Counts of one phase. A "place" is file:line of the program, with the library's line."""

    kernels: Counter[str] = field(default_factory=Counter)
    """Operators that launch something, by name; views, allocations and copies to or from the host
    are none."""
    empty: Counter[str] = field(default_factory=Counter)
    """Operators on tensors without elements, by name and place: nothing is launched."""
    without_effect: Counter[str] = field(default_factory=Counter)
    """Operators among the kernels that return what they got, e.g. a division by 1."""
    flops: int = 0
    """Multiply-add = 2; matrix products, convolutions and attention."""
    moved: int = 0
    """Bytes that all other kernels read and wrote: what the memory's speed bounds."""
    waits: Counter[str] = field(default_factory=Counter)
    """The host stands still until the device is done, by what makes it wait and place."""
    pageable: Counter[str] = field(default_factory=Counter)
    """Bytes copied between the device and memory that is not pinned, without waiting, by place."""
    uploaded: int = 0
    """Bytes copied to the device, from any memory."""
    collectives: dict[str, CollectiveCount] = field(default_factory=dict)
    """By kind and group."""
    attention: dict[str, Counter[str]] = field(default_factory=dict)
    """Calls by kernel that torch would take, and by shape."""
    peak: int = 0
    """Bytes of tensors on the device, at most."""
    alive: int = 0
    """The same when the phase ended for the last time."""
    largest: dict = field(default_factory=lambda: {"bytes": 0})
    """The largest tensor that came into being: bytes, shape, dtype, place."""

    def as_dict(self) -> dict:
        """The phase's counts so far as JSON holds them; later ones do not reach them."""
        counts = deepcopy(vars(self))
        collectives = {name: vars(traffic) for name, traffic in counts["collectives"].items()}
        return counts | {"collectives": collectives}


class Recorder:
    """Counts go to the phase that the program is in."""

    def __init__(self) -> None:
        self.memory = DeviceMemory()
        self.phases: dict[str, Phase] = {}
        self._names = ["setup"]
        self._heights: list[int] = []
        self._spans: list[tuple[str, int]] = []
        self.now = self._open()

    def enter(self, name: str) -> None:
        """Begins the phase `name`: counts go to it until `leave`."""
        self._close()
        self._names.append(name)
        self.now = self._open()

    def leave(self) -> None:
        """Ends a phase, and goes back to the one before."""
        self._close()
        self._names.pop()
        self.now = self._open()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context of a phase: `enter` and `leave`. After an error the phase stays the one in which
        it happened, for whoever reports it."""
        self.enter(name)
        yield
        self.leave()

    @property
    def name(self) -> str:
        """The name of the present phase."""
        return self._names[-1]

    def forget(self) -> None:
        """Starts anew, e.g. after a first update that is not to count."""
        self.phases = {}
        self.restart_timeline()

    def restart_timeline(self) -> None:
        """The image of the memory begins here; counts go on."""
        self._close()
        self._heights.clear()
        self._spans.clear()
        self.memory.take_highest()
        self.now = self._open()

    def launch(self, name: str) -> None:
        """Counts a kernel that the GPU would run."""
        self.now.kernels[name] += 1
        self._heights.append(self.memory.take_highest())

    def wait(self, what: str, where: str | None = None) -> None:
        """The host waits for the device. where: place, if it is not the present one."""
        self.now.waits[f"{what} at {where or place()}"] += 1

    def see(self, value: torch.Tensor) -> None:
        """Takes note of a tensor that an operator returned."""
        size = self.memory.see(value)
        if size > self.now.largest["bytes"]:
            shape, dtype = tuple(value.shape), str(value.dtype)
            self.now.largest = {"bytes": size, "shape": shape, "dtype": dtype, "place": place()}

    def as_dict(self) -> dict[str, dict]:
        """The counts of every phase, for JSON."""
        self._close()
        return {name: phase.as_dict() for name, phase in self.phases.items()}

    def timeline(self, most: int = 600) -> dict:
        """Memory over the order in which kernels are launched: {"kernels", "bytes": most alive at
        each of up to `most` points, "spans": [phase, from which kernel on]}."""
        step = max(1, -(-len(self._heights) // most))
        starts = range(0, len(self._heights), step)
        return {
            "kernels": len(self._heights),
            "bytes": [max(self._heights[start : start + step]) for start in starts],
            "spans": list(self._spans),
        }

    def _open(self) -> Phase:
        self.memory.restart_peak()
        self._spans.append((self._names[-1], len(self._heights)))
        return self.phases.setdefault(self._names[-1], Phase())

    def _close(self) -> None:
        self.now.peak = max(self.now.peak, self.memory.peak)
        self.now.alive = self.memory.now


def place() -> str:
    """The innermost line of the program being run, and of the library that it called, if any.

    In a backward pass there is no such line: then "autograd".
    """
    library = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(_UNSEEN):
            _, is_library, short = path.rpartition(_LIBRARIES)
            is_program = path.startswith(_PACKAGE) or not is_library
            short = path.removeprefix(_BESIDE_THE_PACKAGE) if is_program else short
            where = f"{short}:{frame.f_lineno}"
            if is_program:
                return where if library is None else f"{where} ({library})"
            library = library or where
        frame = frame.f_back
    return library or "autograd"
