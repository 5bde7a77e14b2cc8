"""Files written by `torch.save`, read lazily: tensors stay on disk until one is asked for.

A `.pt` file is a zip archive of one pickle and one record per storage. Our own unpickler rebuilds
only tensors and plain containers; anything else needs `trust`, because unpickling it could run code
that the file's author chose.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, cast

import torch

from megatron_kosmosg.checkpoint.plain_data import check_archive
from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion.tensors import TensorInfo

_TRUSTED_ROOTS = ("torch", "numpy", "builtins", "collections", "argparse", "copyreg", "_codecs")
"""With `trust`, classes of other packages (fairseq, omegaconf) become placeholders that hold their
attributes, so those packages need not be installed."""


class LazyTensor:
    """A tensor on disk, which is read when it is asked for."""

    def __init__(self, storage: _Storage, offset: int, size: tuple, stride: tuple) -> None:
        self._storage, self._offset = storage, offset
        self._size, self._stride = tuple(size), tuple(stride)

    @property
    def info(self) -> TensorInfo:
        """Shape and dtype, as the pickle states them."""
        return TensorInfo(self._size, self._storage.dtype)

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own. Raises ConversionError for a damaged file."""
        flat = self._storage.read()
        try:
            return flat.as_strided(self._size, self._stride, self._offset)
        except RuntimeError as error:  # it would reach beyond the storage
            raise self._storage.damaged(error) from None


class Placeholder:
    """An object of a class that is not imported: only its attributes.

    Arguments of its constructor, as enumerations have one, are left out; nothing asks for them.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__[str(key)] = value

    def append(self, value: Any) -> None:
        self.__dict__.setdefault("items", []).append(value)

    def extend(self, values: list) -> None:
        self.__dict__.setdefault("items", []).extend(values)


def load_lazily(path: Path, *, trust: bool = False) -> Any:
    """What `torch.save` was given, with a LazyTensor in place of every tensor.

    Args:
        trust: also rebuild Python objects other than tensors and plain containers.

    Raises ConversionError for a file that is not whole, is of another kind, or needs `trust`.
    """
    try:
        _check_kind(path)
        return _load(path, trust)
    except ConversionError:
        raise
    except _DAMAGE as error:
        raise ConversionError(
            f"{path} is a zip archive, but not one of torch.save, or a damaged one: {error}"
        ) from None


def _load(path: Path, trust: bool) -> Any:
    try:
        with path.open("rb") as file:
            check_archive(file, path.stat().st_size)
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{path} is packed, and torch.save does not pack: {error}") from None
    archive = zipfile.ZipFile(path)
    (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl")
    root = name.removesuffix("data.pkl")
    if f"{root}constants.pkl" in archive.namelist():
        raise ConversionError(
            f"{path} is a TorchScript archive; give a file with a state dict, for example "
            "torch.save(torch.jit.load(path).state_dict(), 'sd.pt')"
        )
    if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
        raise ConversionError(f"{path} was written on a big-endian machine, which is not supported")
    with archive.open(name) as stream:
        try:
            return _Unpickler(stream, path, archive, root, trust).load()
        except ConversionError:
            raise
        except Exception as error:  # unpickling raises whatever the file's objects raise
            raise ConversionError(f"{path} cannot be unpickled: {error}") from error


def _check_kind(path: Path) -> None:
    if not path.is_file():
        raise ConversionError(f"{path}: no such file")
    if zipfile.is_zipfile(path):
        return
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(16)
    if start.startswith(b"PK\x03\x04"):
        raise ConversionError(
            f"{path} ends too early: the index at the end of the archive is missing ({size:,} "
            "bytes are there); copy or download it again"
        )
    if start[:1] == b"\x80":
        raise ConversionError(
            f"{path} is in the format that PyTorch wrote before version 1.6; load it and save it "
            "again with torch.save of a newer version"
        )
    raise ConversionError(f"{path} is not a file of torch.save: it begins with {start!r}")


_DAMAGE = (KeyError, EOFError, OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a record of a damaged archive raises."""
_BYTE_ARRAY = pickle.BYTEARRAY8[0]


class _Storage:
    """A flat block of numbers in the archive."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, record: str, dtype: torch.dtype):
        self._path, self._archive, self._record, self.dtype = path, archive, record, dtype

    def read(self) -> torch.Tensor:
        try:
            size = self._archive.getinfo(self._record).file_size
            flat = torch.empty(size // self.dtype.itemsize, dtype=self.dtype)
            # What `open` gives for reading; it is annotated as IO[bytes], without readinto.
            with cast(zipfile.ZipExtFile, self._archive.open(self._record)) as stream:
                if stream.readinto(flat.view(torch.uint8).numpy().data) != size:
                    raise EOFError("the record is shorter than the index says")
        except _DAMAGE as error:
            raise self.damaged(error) from None
        return flat

    def damaged(self, error: Exception) -> ConversionError:
        """The error to raise when the numbers are not there."""
        return ConversionError(
            f"{self._path} is damaged at {self._record}: {error}; copy or download it again"
        )


def _rebuild_tensor(storage, offset, size, stride, *unused) -> LazyTensor:
    if not (isinstance(storage, _Storage) and _are_counts([offset, *size, *stride])):
        raise pickle.UnpicklingError("a tensor is described as none can be")
    return LazyTensor(storage, offset, size, stride)


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _rebuild_parameter(data, *unused) -> LazyTensor:
    return data


_PLAIN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
}


_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""What each storage class holds."""


class _Unpickler(pickle._Unpickler):
    """Rebuilds tensors lazily; refuses every other class unless trusted.

    Python's own, which takes memory as the pickle grows; the one in C takes, for an entry of a few
    bytes, as much as that asks for. So would BYTEARRAY8, which torch.save does not write.
    """

    dispatch = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != _BYTE_ARRAY
    }

    def __init__(
        self, stream: Any, path: Path, archive: zipfile.ZipFile, root: str, trust: bool
    ) -> None:
        super().__init__(stream)
        self._path, self._archive, self._root, self._trust = path, archive, root, trust

    def persistent_load(self, saved_id: tuple) -> _Storage:
        kind, storage_type, key = saved_id[:3]
        if kind != "storage" or not isinstance(storage_type, torch.dtype):
            raise ConversionError(f"{self._path} refers to {kind!r}, which is not a tensor")
        return _Storage(self._path, self._archive, f"{self._root}data/{key}", storage_type)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if not self._trust:
            raise ConversionError(
                f"{self._path} holds an object of class {module}.{name}. Rebuilding objects other "
                "than tensors and plain containers can run code that the file's author chose; if "
                "you trust where the file comes from, add --trust-pickle"
            )
        if module.split(".")[0] in _TRUSTED_ROOTS:
            return super().find_class(module, name)
        return type(name, (Placeholder,), {"__module__": module})
