"""Counts every operator before FakeTensorMode turns it into shapes.

Also answers the few that need a number which a tensor without memory does not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_kosmosg.rehearsal.fake_numbers import Numbers
from megatron_kosmosg.rehearsal.recorder import Recorder, place

aten = torch.ops.aten

_NO_KERNEL = frozenset(
    {
        # Views whose schema does not say so.
        "_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "resize_", "set_",
        # Memory alone.
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
        # A copy to the host.
        "_local_scalar_dense",
    }
)  # fmt: skip


_ONE_DTYPE = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "convolution", "native_layer_norm", "native_group_norm"}
)
"""Operators that refuse a mixture on the device, and do not without memory."""


_WHOLE = ("silu_backward", "mish_backward")
"""Operators that a GPU has one kernel for, and that a torch without CUDA takes apart on its
device: all that have a kernel for the CPU and a formula that autograd prefers on other devices."""


def keep_operators_whole() -> torch.library.Library | None:
    """Has autograd hand the operators that a GPU has one kernel for to OperatorWatch as they are.

    The library must be kept as long as this is to hold; None where torch is built with CUDA.
    """
    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("aten", "IMPL")
    for name in _WHOLE:
        library.impl(name, torch.library.fallthrough_kernel, "AutogradCUDA")
    return library


class OperatorWatch(TorchDispatchMode):
    """Counts the operators that run inside it; enter it inside FakeTensorMode."""

    def __init__(self, recorder: Recorder, numbers: Numbers) -> None:
        super().__init__()
        self._recorder, self._numbers = recorder, numbers
        self._scattered_at = "autograd"
        """Where masked_scatter was last called: its backward pass has no line of the program."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func.namespace != "aten":  # a question, such as a tensor's device
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        pinned = kwargs.pop("pin_memory", False)
        answer = self._answer(name, args)
        if answer is not None:
            return answer
        if name in _ONE_DTYPE:
            _check_dtypes(name, args)
        is_copy = self._count_copy(name, args, kwargs)
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not is_copy:
            self._count_kernel(func, name, args, kwargs, out, results)
        for result in results:
            self._recorder.see(result)
            if pinned:
                self._recorder.memory.pin(result)
        self._numbers.follow(name, args, results)
        return out

    def _answer(self, name: str, args: tuple) -> Any:
        """The result that stands in for an operator that reads numbers; None for all others."""
        if name == "_local_scalar_dense":
            (tensor,) = args
            if tensor.device.type == "cuda":
                self._recorder.wait("item()")
            elif not isinstance(tensor, FakeTensor) or tensor.constant is not None:
                return None
            return self._numbers.item(tensor.dtype)
        if name == "equal" and any(isinstance(x, FakeTensor) for x in args):
            if args[0].device.type == "cuda":
                self._recorder.wait("torch.equal")
            return True
        if name == "nonzero" and args[0].device.type == "cuda":
            self._recorder.wait("nonzero()")
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if name == "nonzero" and isinstance(args[0], FakeTensor):  # nothing is out of order
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        if name == "masked_scatter":
            self._scattered_at = place()
        if name == "masked_scatter_backward":  # selects by mask: the host waits for the size
            self._recorder.wait("masked_select, backward of masked_scatter", self._scattered_at)
            return args[0].new_empty(args[2])
        return None

    def _count_copy(self, name: str, args: tuple, kwargs: dict) -> bool:
        """Counts a copy between host and device, and says whether this is one."""
        if name == "_to_copy":
            source = first = args[0]
            target = torch.device(kwargs.get("device") or source.device)
            is_async = kwargs.get("non_blocking", False)
        elif name == "copy_":
            source, first = args[1], args[0]
            target = first.device
            is_async = len(args) > 2 and args[2]
        else:
            return False
        if source.device.type == target.type or "meta" in (source.device.type, target.type):
            return False
        way = f"{source.device.type} -> {target.type}"
        is_upload = target.type == "cuda"
        if is_upload:
            self._recorder.now.uploaded += source.nbytes
        if not is_async:
            self._recorder.wait(f"copy {way}")
        elif not self._recorder.memory.is_pinned(source if is_upload else first):
            self._recorder.now.pageable[f"{way} at {place()}"] += source.nbytes
        return True

    def _count_kernel(
        self, func, name: str, args: tuple, kwargs: dict, out: Any, results: list[torch.Tensor]
    ) -> None:
        if func.is_view or name in _NO_KERNEL:
            return
        # In-place operators on lists of tensors return nothing.
        touched = results or [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if not any(tensor.device.type == "cuda" for tensor in touched):
            return
        phase = self._recorder.now
        if all(tensor.numel() == 0 for tensor in touched):
            phase.empty[f"{name} at {place()}"] += 1
            return
        self._recorder.launch(name)
        if name in ("div", "mul") and len(args) > 1 and _is_one(args[1]):
            phase.without_effect[f"{name} by 1 at {place()}"] += 1
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            phase.flops += formula(*args, **kwargs, out_val=out)
        else:
            read = args[1:] if name == "copy_" else args  # the first is only written
            phase.moved += sum(x.nbytes for x in tree_leaves(read) if _on_the_device(x))
            phase.moved += sum(x.nbytes for x in touched if _on_the_device(x))


def _on_the_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def _check_dtypes(name: str, args: tuple) -> None:
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    dtypes = sorted({str(tensor.dtype) for tensor in tensors})
    if len(dtypes) > 1 and tensors[0].device.type == "cuda":
        raise RuntimeError(f"{name} of tensors of dtype {' and '.join(dtypes)}")


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 1
