"""A checkpoint of weights alone, which `checkpoint.load` takes like any other.

One process writes Megatron-Core's `torch_dist` format through torch's own writer, reading one
tensor of the source at a time. The folder gets its final name when everything is on disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, WriteItem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType

from megatron_kosmosg.checkpoint import folder as checkpoint_folder
from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.load import to_yaml
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.conversion.stored_names import EMBEDDING, stored_key
from megatron_kosmosg.conversion.tensors import (
    TensorInfo,
    TensorSource,
    check_complete,
    in_files,
    num_bytes,
)
from megatron_kosmosg.files import naming_disk
from megatron_kosmosg.models.kosmosg import meta_model
from megatron_kosmosg.models.multimodal_lm import padded_vocab_size
from megatron_kosmosg.progress import ProgressCallback
from megatron_kosmosg.stages import stage_facts

_FILE_BYTES = 1 << 29
"""Largest file, unless one tensor is larger."""


def model_tensors(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of `config.stage`'s model by name, without vocabulary padding."""
    facts = stage_facts(config.stage)
    state = meta_model(config, facts.has_output_head, facts.aligner_parts).state_dict()
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if not name.endswith("_extra_state")
    }
    shapes[EMBEDDING] = (config.model.vocab_size, *shapes[EMBEDDING][1:])
    return shapes


def refuse_existing(folder: Path) -> None:
    """Raises ConversionError when `folder` is a file or holds more than an interrupted write."""
    if folder.exists() and not folder.is_dir():
        raise ConversionError(f"{folder} is a file; give a folder for the checkpoint")
    found = [path.name for path in folder.glob("*") if not path.match("iter_*.tmp")]
    if found:
        raise ConversionError(f"{folder} already holds {sorted(found)[0]}; give a new folder")


def write_checkpoint(
    folder: Path, config: RunConfig, source: TensorSource, progress: ProgressCallback | None = None
) -> Path:
    """Writes the source's tensors, in their own dtypes, as the checkpoint `folder/iter_0000000`,
    and returns it.

    Raises ConversionError, before anything is written, unless the source has exactly the tensors
    of `config.stage`'s model. What was begun is removed again when something fails.

    Args:
        progress: is told how many bytes are written.
    """
    infos = source.names()
    check_complete(infos, model_tensors(config))
    refuse_existing(folder)
    is_new = not folder.exists()
    temporary = checkpoint_folder.begin(folder, 0)
    try:
        with naming_disk(temporary):
            _write(temporary, config, source, infos, progress)
        return checkpoint_folder.finish(temporary, to_yaml(config))
    except BaseException:  # an interrupt too
        shutil.rmtree(folder if is_new else temporary, ignore_errors=True)
        raise


def _write(
    folder: Path,
    config: RunConfig,
    source: TensorSource,
    infos: dict[str, TensorInfo],
    progress: ProgressCallback | None,
) -> None:
    padded_rows = padded_vocab_size(config.model.vocab_size, 1)
    planner = _OneByOne(source, infos, padded_rows, progress)
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)  # nothing comes from a device
    writer.set_up_storage_writer(is_coordinator=True)
    # One plan per file: the writer keeps the tensors of a file until it is closed.
    plans, metadata = planner.create_global_plan(planner.create_local_plans())
    results = [
        writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)
    ]
    writer.finish(metadata, results)
    torch.save({}, folder / "common.pt")  # no progress, no optimizer: nothing to resume
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _OneByOne(DefaultSavePlanner):
    """Reads a tensor when the writer has got to it."""

    def __init__(
        self,
        source: TensorSource,
        infos: dict[str, TensorInfo],
        padded_rows: int,
        progress: ProgressCallback | None,
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._source, self._infos, self._padded_rows = source, infos, padded_rows
        self._progress = progress
        self._shards: dict[MetadataIndex, tuple[str, torch.Size]] = {}
        """Our name of each planned shard, and its shape in the checkpoint."""
        self._bytes_done = 0
        self._bytes_in_all = sum(map(num_bytes, infos.values()))
        self._report()

    def create_local_plans(self) -> list[SavePlan]:
        """One plan per file. One shard per tensor; the layers of a stack share a key."""
        depth: dict[str, int] = {}
        for name in self._infos:
            key, layer = stored_key(name)
            if layer is not None:
                depth[key] = max(depth.get(key, 0), layer + 1)
        files = in_files(self._infos, _FILE_BYTES)
        return [SavePlan([self._item(name, depth) for name in names]) for names in files]

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The tensor of a planned shard, in the checkpoint's shape."""
        name, shape = self._shards[write_item.index]
        tensor = self._source.read(name)
        self._bytes_done += tensor.nbytes
        if name == EMBEDDING:
            padding = tensor.new_zeros(self._padded_rows - len(tensor), *tensor.shape[1:])
            tensor = torch.cat([tensor, padding])
        self._report()
        return tensor.contiguous().reshape(shape)

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._bytes_done, self._bytes_in_all)

    def _item(self, name: str, depth: dict[str, int]) -> WriteItem:
        key, layer = stored_key(name)
        shape, dtype = self._infos[name]
        if name == EMBEDDING:
            shape = (self._padded_rows, *shape[1:])
        offsets, size = (0,) * len(shape), shape
        if layer is not None:
            offsets, size = (layer, *offsets), (depth[key], *shape)
            shape = (1, *shape)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        index = MetadataIndex(key, chunk.offsets)
        self._shards[index] = name, chunk.sizes
        return WriteItem(
            index,
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(size)),
        )
