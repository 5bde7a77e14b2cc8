"""`torch.cuda` as it answers on a node of eight cards of one kind."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from megatron_kosmosg.planning.gpus import GPUS, Gpu
from megatron_kosmosg.rehearsal.cuda_guard import NUM_DEVICES
from megatron_kosmosg.rehearsal.recorder import Recorder


@dataclass
class FakeGpu:
    """The kind of GPU; another one may take its place before a program starts."""

    kind: Gpu

    def properties(self, *_: Any) -> SimpleNamespace:
        """What `torch.cuda.get_device_properties` gives."""
        major, minor = self.kind.capability
        return SimpleNamespace(
            name=f"NVIDIA {self.kind.name}",
            major=major,
            minor=minor,
            total_memory=int(self.kind.memory_gib * 2**30),
            multi_processor_count=132,
        )


def answer_for_a_gpu(recorder: Recorder) -> FakeGpu:
    """Puts the answers into `torch.cuda`, for the rest of this process."""
    device, gpu = torch.device("cuda", 0), FakeGpu(GPUS["h100-80"])

    class Event:
        num_recorded = num_passed = 0
        """Of all events; the device has certainly passed the first `num_passed`."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self._number = 0

        def record(self, *_: Any) -> None:
            Event.num_recorded += 1
            self._number = Event.num_recorded

        def wait(self, *_: Any) -> None: ...

        def query(self) -> bool:
            return self._number <= Event.num_passed

        def synchronize(self) -> None:
            recorder.wait("cuda.Event.synchronize")
            Event.num_passed = max(Event.num_passed, self._number)

        def elapsed_time(self, _: Any) -> float:
            return 1.0

    class Stream:
        cuda_stream = 0

        def __init__(self, *_: Any, **__: Any) -> None:
            self.device = device

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: object) -> None: ...

        def wait_stream(self, _: Any) -> None: ...

        def wait_event(self, _: Any) -> None: ...

        def record_event(self, *_: Any) -> Event:
            return Event()

        def synchronize(self) -> None:
            recorder.wait("cuda.Stream.synchronize")

    class Generator:
        """State of the device's random numbers, of which there are none."""

        def __init__(self) -> None:
            self.device = device

        def get_state(self) -> torch.Tensor:
            return torch.zeros(16, dtype=torch.uint8)

        def set_state(self, _: torch.Tensor) -> None: ...

        def clone_state(self) -> Generator:
            return self

        def graphsafe_get_state(self) -> Generator:
            return self

        def graphsafe_set_state(self, _: Any) -> None: ...

    generators = tuple(Generator() for _ in range(NUM_DEVICES))
    answers = {
        "Event": Event,
        "Stream": Stream,
        "default_generators": generators,
        "is_available": lambda: True,
        "device_count": lambda: NUM_DEVICES,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device": lambda *_: Stream(),
        "stream": lambda stream: stream,
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "is_current_stream_capturing": lambda: False,
        # What is recorded runs as it is: a graph's kernels are counted, not its one launch.
        "make_graphed_callables": lambda run, inputs: run,
        "synchronize": lambda *_: recorder.wait("torch.cuda.synchronize"),
        # Yes would make FakeTensorMode ask the driver for a context.
        "is_initialized": lambda: False,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda function, **_: function(),
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_, **__: generators[0].get_state(),
        "set_rng_state": lambda *_, **__: None,
        "get_device_capability": lambda *_: gpu.kind.capability,
        "get_device_name": lambda *_: gpu.properties().name,
        "get_device_properties": gpu.properties,
        "memory_allocated": lambda *_: recorder.memory.now,
        "memory_reserved": lambda *_: recorder.memory.now,
        "max_memory_allocated": lambda *_: recorder.memory.peak,
        "empty_cache": lambda: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    return gpu
