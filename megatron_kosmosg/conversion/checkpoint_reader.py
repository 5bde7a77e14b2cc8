"""Model weights of a training checkpoint of any layout, one tensor at a time, in one process.

Reads the format of Megatron-Core's `torch_dist` checkpoints through torch's own reader; optimizer
and random state stay on disk, and no process group is made.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from zipfile import BadZipFile

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

from megatron_kosmosg.checkpoint.description import DescriptionReader
from megatron_kosmosg.checkpoint.folder import CONFIG_FILE, find_checkpoint
from megatron_kosmosg.checkpoint.weights import NOT_MODEL
from megatron_kosmosg.config.errors import ConfigError, ConversionError
from megatron_kosmosg.config.load import load_saved_config
from megatron_kosmosg.conversion.stored_names import EMBEDDING, names_under, stored_key
from megatron_kosmosg.conversion.tensors import TensorInfo


class CheckpointTensors:
    """The newest whole checkpoint of a run folder (or one `iter_` folder) as a TensorSource.

    Tensors are whole and without vocabulary padding. `config` is the run's, `stage` its stage.
    Raises ConversionError when there is no undamaged checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.path = find_checkpoint(Path(folder), given_as="")
            self.config = load_saved_config(self.path / CONFIG_FILE)
        except ConfigError as error:
            raise ConversionError(str(error)) from None
        self.stage = self.config.stage
        self._reader = DescriptionReader(self.path)
        self._stored = self._read_metadata()

    def names(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every weight, in the order of the checkpoint's keys."""
        found = {}
        for key, stored in self._stored.items():
            dtype = stored.properties.dtype
            stacked = names_under(key, stored.size[0]) if len(stored.size) else None
            if stacked is None:
                found[key] = TensorInfo(self._own_shape(key), dtype)
            else:
                shape = tuple(stored.size[1:])
                found.update((name, TensorInfo(shape, dtype)) for name in stacked)
        return found

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor; holds it and one stored shard."""
        key, layer = stored_key(name)
        stored = self._stored.get(key)
        if stored is None or (layer is not None and layer >= stored.size[0]):
            raise ConversionError(f"{self.path} holds no {name}")
        shape = self._own_shape(key)
        offsets = (0,) * len(shape)
        if layer is not None:
            offsets, shape = (layer, *offsets[1:]), (1, *shape[1:])
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        if sum(math.prod(item.lengths) for item in items) != math.prod(shape):
            raise ConversionError(f"{self.path} holds only part of {name}")
        tensor = torch.empty(shape, dtype=stored.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        except (OSError, EOFError, RuntimeError, BadZipFile, pickle.UnpicklingError) as error:
            raise ConversionError(f"{self.path}: {name} cannot be read: {error}") from error
        return tensor if layer is None else tensor[0]

    def _own_shape(self, key: str) -> tuple[int, ...]:
        shape = tuple(self._stored[key].size)
        return (self.config.model.vocab_size, *shape[1:]) if key == EMBEDDING else shape

    def _read_metadata(self) -> dict[str, TensorStorageMetadata]:
        try:
            metadata = self._reader.read_metadata()
        except ConfigError as error:
            raise ConversionError(str(error)) from None
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        return {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not key.startswith(NOT_MODEL)
        }


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        spans = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._tensor[tuple(slice(start, start + length) for start, length in spans)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: `resolve_tensor` gave a view."""
