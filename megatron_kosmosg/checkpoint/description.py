"""What a distributed checkpoint says of its own files, read as data and never as a program.

torch.distributed.checkpoint writes that description (`.metadata`) as a pickle and unpickles it with
everything a pickle can do; it does the same with the byte records among the tensors (random state).
Checkpoints come from other people, and a digest proves nothing about a folder whose maker made the
digest too. Here a pickle may build the classes of a description and nothing else, names of files
stay inside the folder, sizes are bounded by the files, and byte records are read as weights are.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path, PosixPath
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import torch as core_strategies
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_kosmosg.checkpoint.plain_data import DataPlanner, FilePart, check_archive
from megatron_kosmosg.config.errors import ConfigError

DESCRIPTION_FILE = ".metadata"
_MAX_BYTES = 1 << 30
"""A description grows with tensors times ranks: 0.35 MB for two ranks, 30 MB for 256."""

_CLASSES = (
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    planner.SavePlan,
    planner.WriteItem,
    planner.WriteItemType,
    planner.TensorWriteData,
    planner.BytesIOWriteData,
    PosixPath,
)


_ENUMERATIONS = (planner.WriteItemType, metadata._MEM_FORMAT_ENCODING)


def _allowed_names() -> dict[tuple[str, str], Any]:
    """What a description may name. Only objects that cannot be changed from within a pickle, and
    classes whose changes `_unpickle` notices."""
    layouts = {
        str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)
    }
    dtypes = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

    def member(found: Any, name: str) -> Any:
        if found not in _ENUMERATIONS:
            raise _NotData("builtins.getattr")
        return found[name]

    return {
        **{(found.__module__, found.__qualname__): found for found in _CLASSES},
        **{("torch", name): value for name, value in dtypes.items()},
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): layouts.__getitem__,
        ("collections", "OrderedDict"): dict,
        # How Python 3.11.0 to 3.11.3 pickle a member of an enumeration.
        ("builtins", "getattr"): member,
        # Python 3.13 keeps the class in a module of its own.
        ("pathlib", "PosixPath"): PosixPath,
        ("pathlib._local", "PosixPath"): PosixPath,
    }


def read_description(folder: Path) -> Metadata:
    """The description of the checkpoint in `folder`.

    Raises ConfigError if it is missing, is no description, names anything that a description does
    not consist of, or speaks of other files than those that lie in the folder.
    """
    path = folder / DESCRIPTION_FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is larger than any description of a checkpoint")
        found = _unpickle(path.read_bytes())
        problem = _problem(found, folder)
    except OSError as error:
        raise ConfigError(f"{folder} has no readable {DESCRIPTION_FILE}: {error}") from error
    except _NotData as error:
        raise ConfigError(
            f"{path} names {error}, which is no part of a checkpoint's description; it would run "
            "code of whoever made it, so it is not read"
        ) from None
    # What a damaged pickle raises is not documented: IndexError, KeyError and TypeError were seen.
    except (pickle.UnpicklingError, EOFError, *_DAMAGE) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if problem is not None:
        raise ConfigError(f"{path} does not fit its folder: {problem}; it is not read")
    return found


class DescriptionReader(FileSystemReader):
    """torch's reader of distributed checkpoints; it reads the description as data, once, and bounds
    the size of records."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._description: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description, under torch's name for it; the arguments (a rank's own file) are not
        used."""
        if self._description is None:
            self._description = read_description(Path(self.path))
            if self._description.storage_meta is None:
                self._description.storage_meta = metadata.StorageMeta()
        assert self._description.storage_meta is not None
        self._description.storage_meta.load_id = self.load_id
        return self._description

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        check_archive(FilePart(file, sinfo.offset, sinfo.length), sinfo.length)
        return super()._slice_file(file, sinfo)


# Megatron-Core makes its reader and planner itself and has no place to hand in others.
core_strategies._get_filesystem_reader = lambda folder, *_, **__: DescriptionReader(folder)
core_strategies.MCoreLoadPlanner = DataPlanner


class _NotData(Exception):
    """A description asks for more than data; the message is what its pickle named."""


_DAMAGE = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError),
    *(MemoryError, RuntimeError, SystemError),
)


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._allowed = _allowed_names()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise _NotData(f"{module}.{name}") from None


def _unpickle(content: bytes) -> Any:
    # A pickle can set attributes of the classes that it may name; that is noticed and undone.
    before = [dict(vars(found)) for found in _CLASSES]
    try:
        return _Unpickler(content).load()
    finally:
        for found, attributes in zip(_CLASSES, before, strict=True):
            _restore(found, attributes)


def _restore(found: type, attributes: dict[str, Any]) -> None:
    for name, value in dict(vars(found)).items():
        if name not in attributes:
            delattr(found, name)
        elif value is not attributes[name]:
            setattr(found, name, attributes[name])
        else:
            continue
        raise _NotData(f"{found.__name__}.{name} to change it")


def _problem(found: Any, folder: Path) -> str | None:
    """What a description claims that its folder does not bear out; None where both agree."""
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        return f"it is a {type(found).__name__} without a list of records"
    sizes: dict[str, int] = {}
    for record in found.storage_data.values():
        name = record.relative_path
        if name not in sizes:
            if not isinstance(name, str) or Path(name).name != name:
                return f"it names a file outside, {name!r}"
            path = folder / name
            if path.is_symlink() or not path.is_file():
                return f"there is no file {name!r}"
            sizes[name] = path.stat().st_size
        if not 0 <= record.offset <= record.offset + record.length <= sizes[name]:
            return f"a record of {name!r} lies outside it"
        if record.transform_descriptors:
            return f"a record of {name!r} is transformed ({record.transform_descriptors})"
    for key, stored in found.state_dict_metadata.items():
        if isinstance(stored, BytesStorageMetadata):
            if MetadataIndex(key) not in found.storage_data:
                return f"no record holds {key}"
            continue
        if not isinstance(stored, TensorStorageMetadata):
            return f"{key} is neither tensor nor bytes"
        for index, chunk in enumerate(stored.chunks):
            record = found.storage_data.get(MetadataIndex(key, chunk.offsets, index))
            if record is None:
                return f"no record holds {key} at {tuple(chunk.offsets)}"
            if record.length < math.prod(chunk.sizes) * stored.properties.dtype.itemsize:
                return f"the record of {key} at {tuple(chunk.offsets)} is too short for it"
        covered = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
        if covered < math.prod(stored.size):
            return f"the records of {key} hold {covered} of {math.prod(stored.size)} values"
    return None
