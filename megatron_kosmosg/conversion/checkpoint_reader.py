"""Model weights of a training checkpoint of any layout, one tensor at a time, in one process.

Reads the format of Megatron-Core's `torch_dist` checkpoints through torch's own reader; optimizer
and random state stay on disk, and no process group is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    LoadPlan,
    ReadItem,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_kosmosg.checkpoint.base_checkpoint import NOT_MODEL, weight_folders
from megatron_kosmosg.checkpoint.base_record import read_base
from megatron_kosmosg.checkpoint.description import DescriptionReader
from megatron_kosmosg.checkpoint.folder import CONFIG_FILE, find_checkpoint
from megatron_kosmosg.checkpoint.plain_data import DAMAGE
from megatron_kosmosg.checkpoint.weight_average import AVERAGE
from megatron_kosmosg.config.errors import ConfigError, ConversionError
from megatron_kosmosg.config.load import load_saved_config
from megatron_kosmosg.conversion.stored_names import EMBEDDING, names_under, stored_key
from megatron_kosmosg.conversion.tensors import TensorInfo, TensorSource
from megatron_kosmosg.models.lora import ADAPTERS, LORA_A, LORA_B
from megatron_kosmosg.parallel.platform import torch_dtype

_AVERAGES = f"{AVERAGE}."
_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}


class CheckpointTensors:
    """The newest whole checkpoint of a run folder (or one `iter_` folder) as a TensorSource.

    Tensors are whole and without vocabulary padding; low-rank adapters are added to the weights
    that they belong to, and are no tensors of their own (`adapter` gives them). Frozen weights that
    it left out are read from its base, in the dtype of the run. `config` is the run's, `stage` its
    stage.
    """

    def __init__(self, folder: Path, *, ema: bool = False, with_base: bool = True) -> None:
        """Opens a checkpoint. Raises ConversionError when there is no undamaged one, none with
        averages, or not the base of it.

        Args:
            folder: a run's folder, its checkpoints, or one of them.
            ema: read the averages of the weights (float32) in place of those that trained.
            with_base: False leaves out what the checkpoint left out.
        """
        try:
            self.path = find_checkpoint(Path(folder), option="")
            self.config = load_saved_config(self.path / CONFIG_FILE)
        except ConfigError as error:
            raise ConversionError(str(error)) from None
        self.stage = self.config.stage
        self._reader = DescriptionReader(self.path)
        self._stored, averages = self._read_metadata(self._reader)
        self._reader_of: dict[str, DescriptionReader] = {}
        self._dtype_of: dict[str, torch.dtype] = {}
        if with_base:
            self._take_base()
        self._prefix_of: dict[str, str] = {}
        self.export_dtype: torch.dtype | None = None
        """In which an export is where none is asked for; None: each tensor's own. Averages are
        float32 beside weights of the training precision."""
        if ema:
            self._take_averages(averages)
            self.export_dtype = torch_dtype(self.config.training.precision)

    def names(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every weight, in the order of the checkpoint's keys."""
        found = self._stored_names()
        return {name: info for name, info in found.items() if not name.endswith(ADAPTERS)}

    def apart(self) -> TensorSource:
        """The same tensors as they are stored: weights without adapters, and the adapters."""
        return _Stored(self._stored_names(), self._read)

    def adapted(self) -> list[str]:
        """The names of the modules that have an adapter."""
        end = f".{LORA_A}"
        return [name.removesuffix(end) for name in self._stored_names() if name.endswith(end)]

    def adapter(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, inputs] and B [outputs, r] of an adapted module."""
        return self._read(f"{module}.{LORA_A}"), self._read(f"{module}.{LORA_B}")

    def _stored_names(self) -> dict[str, TensorInfo]:
        found = {}
        for key, stored in self._stored.items():
            dtype = self._dtype_of.get(key, stored.properties.dtype)
            stacked = names_under(key, stored.size[0]) if len(stored.size) else None
            if stacked is None:
                found[key] = TensorInfo(self._unpadded_shape(key), dtype)
            else:
                shape = tuple(stored.size[1:])
                found.update((name, TensorInfo(shape, dtype)) for name in stacked)
        return found

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor. Memory holds it and one stored shard at a time."""
        tensor = self._read(name)
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or stored_key(f"{module}.{LORA_A}")[0] not in self._stored:
            return tensor
        a, b = (part.float() for part in self.adapter(module))
        lora = self.config.lora
        return (tensor.float() + lora.alpha / lora.rank * (b @ a)).to(tensor.dtype)

    def _read(self, name: str) -> torch.Tensor:
        key, layer = stored_key(name)
        stored = self._stored.get(key)
        if stored is None or (layer is not None and layer >= stored.size[0]):
            raise ConversionError(f"{self.path} holds no {name}")
        shape = self._unpadded_shape(key)
        offsets = (0,) * len(shape)
        if layer is not None:
            offsets, shape = (layer, *offsets[1:]), (1, *shape[1:])
        requested = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        on_disk = self._prefix_of.get(key, "") + key
        items = create_read_items_for_chunk_list(on_disk, stored, [requested])
        if sum(math.prod(item.lengths) for item in items) != math.prod(shape):
            raise ConversionError(f"{self.path} holds only part of {name}")
        tensor = torch.empty(shape, dtype=stored.properties.dtype)
        try:
            reader = self._reader_of.get(key, self._reader)
            reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        except DAMAGE as error:
            raise ConversionError(f"{self.path}: {name} cannot be read: {error}") from error
        tensor = tensor.to(self._dtype_of.get(key, tensor.dtype))
        return tensor if layer is None else tensor[0]

    def _unpadded_shape(self, key: str) -> tuple[int, ...]:
        shape = tuple(self._stored[key].size)
        return (self.config.model.vocab_size, *shape[1:]) if key == EMBEDDING else shape

    def _take_base(self) -> None:
        """Adds the weights that the checkpoint takes from others."""
        try:
            base, folders = read_base(self.path), weight_folders(self.path)
        except ConfigError as error:
            raise ConversionError(str(error)) from None
        if base is None:
            return
        readers = {folder: DescriptionReader(folder) for folder in {*folders.values()}}
        found = {folder: self._read_metadata(reader)[0] for folder, reader in readers.items()}
        for key, dtype in base.weights.items():
            if dtype not in _DTYPES:
                raise ConversionError(f"{self.path} has {key} as {dtype}, which is no dtype")
            self._stored[key] = found[folders[key]][key]
            self._reader_of[key] = readers[folders[key]]
            self._dtype_of[key] = _DTYPES[dtype]

    def _take_averages(self, averages: dict[str, TensorStorageMetadata]) -> None:
        if not averages:
            raise ConversionError(
                f"{self.path} holds no average of the weights (its run had "
                f"optimizer.ema_decay={self.config.optimizer.ema_decay:g}); leave --ema out, or "
                "give a run with optimizer.ema_decay above 0"
            )
        self._stored.update(averages)
        self._prefix_of = dict.fromkeys(averages, _AVERAGES)

    @staticmethod
    def _read_metadata(
        reader: DescriptionReader,
    ) -> tuple[dict[str, TensorStorageMetadata], dict[str, TensorStorageMetadata]]:
        """The weights, and averages under the names of their weights."""
        try:
            metadata = reader.read_metadata()
        except ConfigError as error:
            raise ConversionError(str(error)) from None
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        tensors = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        weights = {key: found for key, found in tensors.items() if not key.startswith(NOT_MODEL)}
        averages = {
            key.removeprefix(_AVERAGES): found
            for key, found in tensors.items()
            if key.startswith(_AVERAGES)
        }
        return weights, averages


class _Stored:
    """Tensors as a checkpoint has them, as a TensorSource."""

    def __init__(self, names: dict[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> None:
        self._names, self._read = names, read

    def names(self) -> dict[str, TensorInfo]:
        return dict(self._names)

    def read(self, name: str) -> torch.Tensor:
        return self._read(name)


class _Into(DefaultLoadPlanner):
    """A load plan that puts what is read into one given tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        spans = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._tensor[tuple(slice(start, start + length) for start, length in spans)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Does nothing: `resolve_tensor` gave a view, so the tensor is filled already."""
