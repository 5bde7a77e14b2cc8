"""Everything that stands in for a GPU and for the other ranks, in one process, once and for all."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_kosmosg.rehearsal.attention_choice import answer_for_attention
from megatron_kosmosg.rehearsal.fake_collectives import Collectives
from megatron_kosmosg.rehearsal.fake_gpu import FakeGpu, answer_for_a_gpu
from megatron_kosmosg.rehearsal.fake_numbers import Numbers, answer_for_tensors
from megatron_kosmosg.rehearsal.operator_watch import OperatorWatch, keep_operators_whole
from megatron_kosmosg.rehearsal.recorder import Recorder

_NO_DRIVER = "avoid_device_init"
_PROGRAM = (
    "rehearsal.rank_update",
    "rehearsal.rehearsed_score_rank",
    "rehearsal.rehearsed_ranks",
    "stages.pretrain",
    "stages.align",
    "stages.instruct",
)
"""What is rehearsed, imported once and not again in the process of every case."""


@dataclass(frozen=True)
class StandIns:
    recorder: Recorder
    numbers: Numbers
    collectives: Collectives
    gpu: FakeGpu
    folder: Path
    """For sizes of frozen models that are not on this machine."""
    operators: Any
    """What holds some of torch's operators in their place."""

    def device(self) -> FakeDeviceMode:
        """Context in which tensors have no memory, and operators are counted."""
        return FakeDeviceMode(self.recorder, self.numbers)


class FakeDeviceMode:
    """FakeTensorMode and the watch over it, as one context manager."""

    def __init__(self, recorder: Recorder, numbers: Numbers) -> None:
        # Tensors made before, such as the scheduler's tables, may be used inside.
        self._modes = FakeTensorMode(allow_non_fake_inputs=True), OperatorWatch(recorder, numbers)

    def __enter__(self) -> None:
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def install(folder: Path) -> StandIns:
    """Puts the answers into torch and the libraries, then imports the program on top of them.

    folder: for files, an empty one. The order matters: each takes names out of those before it.
    """
    recorder, numbers = Recorder(), Numbers()
    collectives = Collectives(recorder, numbers)
    # Although torch.cuda says that there is a device.
    setattr(FakeTensorMode, _NO_DRIVER, True)
    gpu = answer_for_a_gpu(recorder)
    answer_for_tensors(recorder, numbers)
    answer_for_attention(recorder)
    operators = keep_operators_whole()
    collectives.install()
    files = importlib.import_module("megatron_kosmosg.rehearsal.frozen_files")
    files.answer_for_files()
    phases = importlib.import_module("megatron_kosmosg.rehearsal.phases")
    phases.name_phases(recorder)
    for name in _PROGRAM:
        importlib.import_module(f"megatron_kosmosg.{name}")
    links = importlib.import_module("megatron_kosmosg.rehearsal.fake_links")
    connect: Any = importlib.import_module("megatron_kosmosg.score.connect")
    connect.open_fleet = lambda *_: links.FakeFleet(recorder)
    links.answer_every_request(importlib.import_module("megatron_kosmosg.training.step").Reporter)
    return StandIns(recorder, numbers, collectives, gpu, folder, operators)
