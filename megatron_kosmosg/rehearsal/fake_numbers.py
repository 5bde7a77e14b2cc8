"""Numbers of tensors without memory, and what torch's C++ would read straight from that memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._device import _device_constructors

from megatron_kosmosg.rehearsal.recorder import Recorder

_KNOWN = "rehearsed_list"
"""Attribute of a tensor without numbers: the numbers it would have."""


class Numbers:
    """The numbers that a program reads out of tensors that hold nothing."""

    def __init__(self) -> None:
        self.flag = True
        """Of booleans and bytes, by which ranks tell each other facts."""

    def item(self, dtype: torch.dtype) -> bool | int | float:
        """The value that a single number has: 0, so that no overflow was found and no signal
        received; flags apart."""
        if dtype in (torch.bool, torch.uint8):
            return self.flag if dtype is torch.bool else int(self.flag)
        return 0.0 if dtype.is_floating_point else 0

    def tolist(self, tensor: torch.Tensor) -> Any:
        """The list that `set_list` set, else ones, because counts are divided by, and zeros for
        integers."""
        known = getattr(tensor, _KNOWN, None)
        if known is not None:
            return known
        return _nested(tuple(tensor.shape), 1.0 if tensor.is_floating_point() else 0)

    def set_list(self, tensor: torch.Tensor, numbers: list) -> None:
        """Sets what `tensor.tolist()` is to give."""
        setattr(tensor, _KNOWN, numbers)

    def follow(self, name: str, args: tuple, results: list[torch.Tensor]) -> None:
        """Makes what is known of a list of numbers hold for its copies and slices, too."""
        known = getattr(args[0], _KNOWN, None) if args else None
        if known is None or name not in ("_to_copy", "clone", "detach", "alias", "slice"):
            return
        if name == "slice":
            dim, start, end, step = (*args[1:], *(0, None, None, 1)[len(args) - 1 :])
            known = known[slice(start, end, step)] if dim == 0 else None
        if known is not None:
            (result,) = results
            number = float if result.is_floating_point() else int
            self.set_list(result, [number(x) for x in known])


def answer_for_tensors(recorder: Recorder, numbers: Numbers) -> None:
    """Puts the answers into torch, for the rest of this process."""
    real_list, real_tensor, real_numpy = torch.Tensor.tolist, torch.tensor, torch.Tensor.numpy

    def tolist(self: torch.Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return real_list(self)
        if self.device.type == "cuda":
            recorder.wait("tolist()")
        return numbers.tolist(self)

    def tensor(data: Any, **options: Any) -> torch.Tensor:
        return real_tensor(_read(data), **options)

    def numpy(self: torch.Tensor, **options: Any) -> np.ndarray:
        if not isinstance(self, FakeTensor):
            return real_numpy(self, **options)
        if self.device.type == "cuda":
            raise TypeError("a tensor on the device has no array: copy it to the host first")
        return np.zeros(tuple(self.shape), str(self.dtype).removeprefix("torch."))

    def pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
        pinned = self.clone()
        recorder.memory.pin(pinned)
        return pinned

    # `with torch.device(...)` knows functions by identity, from when it is first asked: from now.
    _device_constructors()
    answers: tuple[tuple[Any, str, Callable], ...] = (
        (torch, "tensor", tensor),
        (torch.Tensor, "tolist", tolist),
        (FakeTensor, "tolist", tolist),
        (torch.Tensor, "numpy", numpy),
        (torch.Tensor, "pin_memory", pin_memory),
        (torch.Tensor, "is_pinned", lambda self, *_: recorder.memory.is_pinned(self)),
        (torch.Tensor, "record_stream", lambda self, _: None),
        (torch.nn.Module, "_apply", _apply),
    )
    for owner, name, answer in answers:
        setattr(owner, name, answer)


def _nested(shape: tuple[int, ...], filling: Any) -> Any:
    """Lists of lists of that shape, filled with `filling`."""
    if not shape:
        return filling
    return [_nested(shape[1:], filling) for _ in range(shape[0])]


def _read(data: Any) -> Any:
    """The data with numbers in place of the tensors inside its lists, which C++ cannot read."""
    if isinstance(data, (list, tuple)):
        return [x.item() if isinstance(x, FakeTensor) else _read(x) for x in data]
    return data


def _apply(self: torch.nn.Module, fn: Callable, recurse: bool = True) -> torch.nn.Module:
    """Stands for nn.Module's `_apply`: parameters stay the objects that they are and get new data.

    torch would swap fake ones for others, which it cannot while there are weak references to them.
    """
    if recurse:
        for child in self.children():
            child._apply(fn)
    with torch.no_grad():
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            new = fn(parameter)
            if isinstance(parameter, FakeTensor):
                parameter.data = new
                parameter.fake_device = new.device
            elif new is not parameter:
                self._parameters[name] = torch.nn.Parameter(new, parameter.requires_grad)
    return self
