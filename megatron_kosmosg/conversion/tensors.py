"""Named tensors that are read one at a time, and the view of one format as the other."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from typing import NamedTuple, Protocol

import torch

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion.rules import RuleTable, summary


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def num_bytes(info: TensorInfo) -> int:
    """Size of the tensor in memory, in bytes."""
    return math.prod(info.shape) * info.dtype.itemsize


def in_files(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """The names in their order, cut into files of at most `max_bytes`; a larger tensor is alone."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        size = num_bytes(info)
        if files[-1] and filled + size > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


class TensorSource(Protocol):
    """A file or folder of tensors: what it holds is known without reading them."""

    def names(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        ...


class InMemory:
    """A TensorSource of the tensors in a dict."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class InDtype:
    """A source whose floating-point tensors are cast when they are read; None casts nothing."""

    def __init__(self, source: TensorSource, dtype: torch.dtype | None) -> None:
        self._source, self._dtype = source, dtype

    def names(self) -> dict[str, TensorInfo]:
        infos = self._source.names()
        return {name: TensorInfo(i.shape, self._target_dtype(i.dtype)) for name, i in infos.items()}

    def read(self, name: str) -> torch.Tensor:
        """Raises ConversionError where a number is too large for the dtype."""
        tensor = self._source.read(name)
        cast = tensor.to(self._target_dtype(tensor.dtype))
        if cast.dtype != tensor.dtype and not _all_finite(cast) and _all_finite(tensor):
            raise ConversionError(
                f"{name} has numbers up to {tensor.abs().max():.3g}, too large for "
                f"{str(cast.dtype).removeprefix('torch.')}; give --dtype bf16 or fp32"
            )
        return cast

    def _target_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype


def _all_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


class JoinedSources:
    """Several sources with different names as one."""

    def __init__(self, *sources: TensorSource) -> None:
        self._owner: dict[str, TensorSource] = {}
        for source in sources:
            for name in source.names():
                assert name not in self._owner, f"two sources hold {name}"
                self._owner[name] = source

    def names(self) -> dict[str, TensorInfo]:
        infos = {source: source.names() for source in dict.fromkeys(self._owner.values())}
        return {name: infos[source][name] for name, source in self._owner.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._owner[name].read(name)


class _Translated:
    """A source under the names of the other side of a table; tensors are made when read."""

    def __init__(self, source: TensorSource, names: Collection[str], recipe) -> None:
        self._source, self._names, self._recipe = source, list(names), recipe

    def names(self) -> dict[str, TensorInfo]:
        infos = self._source.names()
        found = {}
        for name in self._names:
            sources, make = self._recipe(name)
            inputs = [
                torch.empty(infos[s].shape, dtype=infos[s].dtype, device="meta") for s in sources
            ]
            made = make(inputs)
            found[name] = TensorInfo(tuple(made.shape), made.dtype)
        return found

    def read(self, name: str) -> torch.Tensor:
        sources, make = self._recipe(name)
        return make([self._source.read(source) for source in sources])


def widest_dtype(source: TensorSource) -> torch.dtype:
    """The floating-point dtype that holds every number of the source."""
    dtypes = {info.dtype for info in source.names().values() if info.dtype.is_floating_point}
    return functools.reduce(torch.promote_types, dtypes)


def as_native(table: RuleTable, external: TensorSource, native: Collection[str]) -> TensorSource:
    """The external tensors under the names `native`. Call `table.check` and `check_ties` before."""
    return _Translated(external, native, table.native_recipe)


def as_external(table: RuleTable, native: TensorSource) -> TensorSource:
    """The native tensors under external names, tied ones once."""
    return _Translated(native, table.external_names(native.names()), table.external_recipe)


def check_ties(table: RuleTable, external: TensorSource) -> None:
    """Raises ConversionError when a tensor and its tied duplicate differ."""
    for name, duplicate in table.ties(external.names()):
        if not torch.equal(external.read(name), external.read(duplicate)):
            raise ConversionError(
                f"{duplicate} differs from {name}; this model ties the two, so one of them would "
                "be lost. Tie them in the file first"
            )


def check_shapes(
    found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], remedy: str
) -> None:
    """Raises ConversionError, ending in `remedy`, when a tensor has another shape than expected."""
    wrong = {
        name: (found[name].shape, shape)
        for name, shape in expected.items()
        if found[name].shape != tuple(shape)
    }
    if wrong:
        first, (shape, needed) = next(iter(wrong.items()))
        others = [line for line in summary(wrong) if line != first][:5]
        raise ConversionError(
            f"{first} has shape {list(shape)}, the model needs {list(needed)}"
            + (f" ({len(wrong)} tensors differ: {', '.join(others)})" if len(wrong) > 1 else "")
            + f"; {remedy}"
        )


class Selected:
    """The tensors of a source whose names start with one of the prefixes."""

    def __init__(self, source: TensorSource, prefixes: tuple[str, ...]) -> None:
        self._source, self._prefixes = source, prefixes

    def names(self) -> dict[str, TensorInfo]:
        infos = self._source.names().items()
        return {name: info for name, info in infos if name.startswith(self._prefixes)}

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(name)


def check_complete(
    found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ConversionError unless `found` has exactly the names and shapes of `expected`."""
    for what, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has no place for", found.keys() - expected.keys()),
    ):
        if names:
            lines = ", ".join(summary(sorted(names), limit=5))
            raise ConversionError(f"the source or the model {what} {lines}")
    check_shapes(found, expected, "check the sizes under model")
