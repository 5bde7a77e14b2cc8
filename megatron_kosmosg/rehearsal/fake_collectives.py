"""Process groups of a run of which this process is one rank: they check, count and send nothing.

Checked is what NCCL checks: device, memory layout, dtypes and sizes. A pipeline neighbour's tensor
has the shape that was sent to it, or that the caller knows from the neighbour's own rehearsal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_kosmosg.rehearsal.fake_numbers import Numbers
from megatron_kosmosg.rehearsal.recorder import CollectiveCount, Recorder

_NUM_DIMENSIONS = 3
"""Of what pipeline stages send each other; its shape travels before it, as so many integers."""


class _Done:
    """The handle of an operation that is over at once."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class _Store(dist.Store):
    """A store that keeps what it is told, and knows at once what others would tell it."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, str] = {}

    def set(self, key: str, value: bytes) -> None:
        self.values[key] = bytes(value).decode()

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def deleteKey(self, key: str) -> bool:  # the name under which C++ asks
        return self.values.pop(key, None) is not None


class Collectives:
    """Stands for `torch.distributed` on one rank."""

    def __init__(self, recorder: Recorder, numbers: Numbers) -> None:
        self._recorder, self._numbers = recorder, numbers
        self._names: dict[dist.ProcessGroup, str] = {}
        self._of_hosts: set[dist.ProcessGroup] = set()
        """Groups over gloo, whose tensors are in the hosts' memory."""
        self.sent: dict[int | None, tuple[int, ...]] = {}
        """{global rank: shape of the last tensor sent to it}, shapes themselves left out."""
        self.announced: tuple[int, ...] | None = None
        """Shape of what the pipeline stage before sends, where nothing was sent to it yet."""
        self.store = _Store()
        """What pipeline stages tell each other beside the tensors."""
        self.gathered_object: Any = None
        """What the other ranks give `all_gather_object` where this rank has nothing to say."""

    def install(self) -> None:
        """Replaces torch.distributed's functions for the rest of the process; has to come before
        anything takes names out of it."""
        real_group, real_start = dist.new_group, dist.init_process_group

        def new_group(ranks: Sequence[int] | None = None, *_: Any, **named: Any):
            group = real_group(ranks, backend="fake")
            if isinstance(group, dist.ProcessGroup):
                self._names[group] = named.get("group_desc") or "unnamed"
                if named.get("backend") == "gloo":
                    self._of_hosts.add(group)
            return group

        def init_process_group(backend: str, *, rank: int, world_size: int, **_: Any) -> None:
            if backend != "nccl":
                raise RuntimeError(f"backend {backend} has no collectives on CUDA tensors")
            real_start("fake", store=FakeStore(), rank=rank, world_size=world_size)

        def rendezvous(_: str, rank: int, world_size: int, **__: Any):
            return iter([(dist.HashStore(), rank, world_size)])

        gather = self._many("all_gather", is_gather=True)
        scatter = self._many("reduce_scatter", is_gather=False)
        answers: dict[str, Callable] = {
            "new_group": new_group,
            "init_process_group": init_process_group,
            "rendezvous": rendezvous,
            "TCPStore": lambda *_, **__: self.store,
            "all_reduce": self._one("all_reduce"),
            "reduce": self._one("reduce"),
            "broadcast": self._one("broadcast"),
            "all_gather_into_tensor": gather,
            "_all_gather_base": gather,
            "reduce_scatter_tensor": scatter,
            "_reduce_scatter_base": scatter,
            "all_gather": self._all_gather,
            "all_gather_object": self._all_gather_object,
            "broadcast_object_list": lambda *_, **__: None,
            "barrier": lambda *_, **__: None,
            "isend": self._send,
            "send": self._send,
            "irecv": self._receive,
            "recv": self._receive,
            "batch_isend_irecv": self._batch,
            "_coalescing_manager": _Coalesced,
        }
        for name, answer in answers.items():
            setattr(dist, name, answer)
            setattr(c10d, name, answer)

    def _one(self, kind: str) -> Callable:
        def call(tensor: torch.Tensor, *args: Any, group=None, async_op=False, **_: Any):
            self._count(kind, _group(args, group), tensor)
            return _Done() if async_op else None

        return call

    def _many(self, kind: str, *, is_gather: bool) -> Callable:
        def call(output: torch.Tensor, source: torch.Tensor, *args: Any, **named: Any):
            group = _group(args, named.get("group"))
            self._count(kind, group, output, source)
            whole, part = (output, source) if is_gather else (source, output)
            if whole.numel() != dist.get_world_size(group) * part.numel():
                raise RuntimeError(
                    f"{kind} over {dist.get_world_size(group)} ranks from {tuple(source.shape)} "
                    f"to {tuple(output.shape)}"
                )
            return _Done() if named.get("async_op") else None

        return call

    def _all_gather(self, outputs: list, source: torch.Tensor, group=None, async_op=False):
        self._count("all_gather", group, source, *outputs)
        if len(outputs) != dist.get_world_size(group):
            raise RuntimeError(
                f"all_gather over {dist.get_world_size(group)} ranks into {len(outputs)} tensors"
            )
        return _Done() if async_op else None

    def _all_gather_object(self, objects: list, value: Any, group=None) -> None:
        objects[:] = [value or self.gathered_object] * len(objects)

    def _send(self, tensor: torch.Tensor, dst: int | None = None, group=None, **_: Any) -> _Done:
        self._count("send", group, tensor)
        if not _is_shape(tensor):
            self.sent[dst] = tuple(tensor.shape)
        return _Done()

    def _receive(self, tensor: torch.Tensor, src: int | None = None, group=None, **_: Any) -> _Done:
        self._count("receive", group, tensor)
        if _is_shape(tensor):
            # What comes back has the shape of what was sent; all chunks of a pipeline alike.
            known = self.sent.get(src) or self.announced or next(iter(self.sent.values()), None)
            if known is None:
                raise RuntimeError(f"nobody said what rank {src} sends")
            self._numbers.set_list(tensor, list(known))
        return _Done()

    def _batch(self, operations: list[dist.P2POp]) -> list[_Done]:
        return [each.op(each.tensor, each.peer, group=each.group) for each in operations]

    def _count(self, kind: str, group: dist.ProcessGroup | None, *tensors: torch.Tensor):
        backend, place = ("gloo", "cpu") if group in self._of_hosts else ("NCCL", "cuda")
        for tensor in tensors:
            if tensor.device.type != place:
                raise RuntimeError(f"{kind}: {backend} has no tensors on {tensor.device.type}")
            if not tensor.is_contiguous():
                raise RuntimeError(
                    f"{kind}: NCCL wants contiguous tensors, not {tuple(tensor.shape)} with "
                    f"strides {tensor.stride()}"
                )
            if tensor.dtype is torch.bool and "reduce" in kind:
                raise RuntimeError(f"{kind}: NCCL does not reduce {tensor.dtype}")
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise RuntimeError(f"{kind} between {' and '.join(str(x.dtype) for x in tensors)}")
        name = f"{kind} over {self._name(group)}"
        traffic = self._recorder.now.collectives.setdefault(name, CollectiveCount())
        traffic.calls += 1
        traffic.num_bytes += sum(tensor.nbytes for tensor in tensors)

    def _name(self, group: dist.ProcessGroup | None) -> str:
        if group is None or group is dist.group.WORLD:
            return f"WORLD of {dist.get_world_size()}"
        return f"{self._names.get(group, 'unnamed')} of {group.size()}"


class _Coalesced:
    """Context manager that groups collectives into one launch."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Done:
        return _Done()

    def __exit__(self, *_: object) -> None: ...


def _group(args: tuple, named: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group among positional arguments, else the one given by name."""
    return next((arg for arg in args if isinstance(arg, dist.ProcessGroup)), named)


def _is_shape(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.int64 and tuple(tensor.shape) == (_NUM_DIMENSIONS,)
